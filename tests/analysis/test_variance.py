"""Theorems 1 and 2 on a tabular policy, the counterexample, and the Gram route for a model's gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rest.analysis.gradient_variance import (
    RegionGram,
    WeightingVariance,
    compare_weightings,
    entropy_against_score,
    region_gradients,
)
from megatron_rest.analysis.tabular import TabularPolicy, decisive_token, tabular_experiment
from megatron_rest.analysis.variance import ASSUMPTIONS, main
from megatron_rest.types import TokenRegion
from megatron_rest.weighting import RestWeighting, variance_optimal_weights


@pytest.fixture(scope="module", params=[0, 1])
def results(request: pytest.FixtureRequest) -> dict[str, WeightingVariance]:
    rows = tabular_experiment(num_sequences=3000, seed=request.param)
    return {row.name: row for row in rows}


def test_every_variance_is_under_theorem_1s_bound(results: dict[str, WeightingVariance]) -> None:
    for row in results.values():
        assert row.bound is not None
        assert row.exact is not None
        assert row.exact <= row.bound
        assert row.variance - 3 * row.standard_error <= row.bound


def test_measured_variance_agrees_with_the_exact_one(results: dict[str, WeightingVariance]) -> None:
    for row in results.values():
        assert row.exact is not None
        assert abs(row.variance - row.exact) < 4 * row.standard_error


def test_theorem_2_has_the_least_bound_and_beats_uniform(results: dict[str, WeightingVariance]) -> None:
    optimal, uniform = results["optimal (Theorem 2)"], results["uniform"]
    assert all(optimal.bound <= row.bound * (1 + 1e-12) for row in results.values())  # type: ignore[operator]
    assert optimal.variance < optimal.bound  # type: ignore[operator]
    assert optimal.exact < uniform.exact  # type: ignore[operator]
    assert optimal.ratio + 5 * optimal.ratio_standard_error < 1
    for name in ("ResT constants, progress 0", "entropy, as trained (clipped)"):
        assert results[name].ratio + 3 * results[name].ratio_standard_error < 1


def test_the_least_bound_is_the_closed_form() -> None:
    beta = TabularPolicy.random(3).beta()
    weights = variance_optimal_weights(beta)
    steps = len(beta)
    assert weights.mean() == pytest.approx(1.0)
    assert (beta * weights**2).sum() == pytest.approx(steps**2 / (1 / beta).sum())
    rng = np.random.default_rng(0)
    for _ in range(200):  # no other weights of mean 1 come lower
        other = np.abs(weights * (1 + 0.3 * rng.normal(size=steps)))
        other /= other.mean()
        assert (beta * other**2).sum() >= (beta * weights**2).sum()


def test_the_policy_is_what_it_says() -> None:
    policy = TabularPolicy.random(0)
    occupancy = policy.occupancy()
    np.testing.assert_allclose(occupancy.sum(axis=1), 1.0)
    assert (policy.score_norm() <= policy.beta() + 1e-12).all()  # Lemma 2
    states, _ = policy.sample(np.random.default_rng(1), 20_000)
    for t in (1, 10, len(occupancy) - 1):
        seen = np.bincount(states[:, t], minlength=occupancy.shape[1]) / len(states)
        np.testing.assert_allclose(seen, occupancy[t], atol=0.02)


def test_tabular_gradients_are_those_of_the_log_probability() -> None:
    policy = TabularPolicy.random(2)
    states, actions = policy.sample(np.random.default_rng(0), 1)
    weights = np.linspace(0.5, 1.5, states.shape[1])

    def objective(logits: np.ndarray) -> float:
        log_p = np.log(TabularPolicy(logits, policy.region_of_step, policy.states_of_region).probabilities)
        return float((weights * log_p[states[0], actions[0]]).sum())

    gradient = policy.gradients(states, actions, weights).reshape(policy.logits.shape)
    step = 1e-6
    for s, v in zip(states[0, :5], actions[0, :5], strict=True):
        nudge = np.zeros_like(policy.logits)
        nudge[s, v] = step
        numeric = (objective(policy.logits + nudge) - objective(policy.logits - nudge)) / (2 * step)
        assert gradient[s, v] == pytest.approx(numeric, abs=1e-6)


def test_decisive_token_breaks_the_bound() -> None:
    numbers = decisive_token()
    assert numbers["mean_squared_advantage"] == pytest.approx(1.0101, abs=1e-4)
    assert numbers["entropy"] == pytest.approx(0.0560, abs=1e-4)
    assert numbers["bound"] == pytest.approx(0.05501, abs=2e-5)
    assert numbers["variance"] == pytest.approx(1.9402, abs=1e-4)
    assert numbers["variance"] > 35 * numbers["bound"]
    assert numbers["variance_if_independent"] < numbers["bound"]


def model_like(num_sequences: int = 40, dimension: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    gradients = rng.normal(size=(num_sequences, 6, dimension)) * np.array([0, 1, 5, 1, 2, 3])[None, :, None] + 0.2
    counts = rng.integers(1, 20, size=(num_sequences, 6))
    return gradients, counts, rng.normal(size=num_sequences)


def test_gram_route_is_the_direct_one_for_any_block_split() -> None:
    gradients, counts, scale = model_like()
    gram = RegionGram(len(scale))
    for block in (slice(0, 7), slice(7, 8), slice(8, 30)):
        gram.add_block(gradients[:, :, block])
    weighting = RestWeighting.paper()
    rows = compare_weightings(gram, counts, scale, {"paper": weighting}, progress=0.3)
    direct = []
    for i, n in enumerate(counts):
        regions = np.repeat(np.arange(1, 6), n[1:])
        weights = weighting(regions, progress=0.3)
        by_region = [weights[regions == r][0] for r in range(1, 6)]
        direct.append(scale[i] * (np.array(by_region)[:, None] * gradients[i, 1:]).sum(axis=0))
    expected = np.var(np.stack(direct), axis=0, ddof=1).sum()
    assert rows[1].variance == pytest.approx(expected, rel=1e-6)
    uniform = (scale[:, None, None] * gradients).sum(axis=1)
    assert rows[0].variance == pytest.approx(np.var(uniform, axis=0, ddof=1).sum(), rel=1e-9)
    assert rows[0].ratio == 1
    assert rows[0].ratio_standard_error == 0
    signal = (uniform.mean(axis=0) ** 2).sum() - rows[0].variance / len(scale)
    assert rows[0].signal == pytest.approx(signal, rel=1e-9)


def test_errors_of_clustered_sequences_are_those_of_their_cluster_means() -> None:
    """Siblings that are copies of each other count once."""
    gradients, counts, scale = model_like(20)
    rows = {}
    for copies in (1, 3):
        gram = RegionGram(20 * copies)
        gram.add_block(np.repeat(gradients, copies, axis=0).astype(np.float32))
        data = (gram, np.repeat(counts, copies, axis=0), np.repeat(scale, copies))
        weightings = {"paper": RestWeighting.paper()}
        rows[copies] = compare_weightings(*data, weightings, clusters=np.repeat(np.arange(20), copies))[1]
        alone = compare_weightings(*data, weightings)[1]
        if copies == 1:
            assert alone.ratio_standard_error == pytest.approx(rows[1].ratio_standard_error)
    assert rows[3].ratio == pytest.approx(rows[1].ratio, rel=1e-5)
    assert rows[3].ratio_standard_error == pytest.approx(rows[1].ratio_standard_error, rel=1e-5)
    assert alone.ratio_standard_error < 0.7 * rows[3].ratio_standard_error


def test_region_gradients_of_a_model() -> None:
    """Weighted with region weights they add up to autograd's gradient of the weighted objective."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 11)).double()
    parameters = list(model.parameters())
    hidden, labels = torch.randn(30, 5).double(), torch.randint(0, 11, (30,))
    regions, owner = torch.randint(0, 6, (30,)), torch.arange(30) % 3

    def log_probs() -> torch.Tensor:
        return torch.log_softmax(model(hidden), -1)[torch.arange(30), labels]

    gradients, counts = region_gradients(log_probs(), regions, owner, parameters, num_sequences=3)
    assert gradients.shape == (3, 6, sum(p.numel() for p in parameters))
    assert counts.sum() == (regions > 0).sum()
    table = torch.tensor([0.0, 1.0, 0.6, 1.2, 0.7, 0.3]).double()
    for i in range(3):
        objective = (table[regions] * log_probs())[owner == i].sum()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters)])
        np.testing.assert_allclose(table.numpy() @ gradients[i], expected.numpy(), atol=1e-6)


def test_optimal_region_weights_from_measured_norms_lower_the_variance() -> None:
    from megatron_rest.config import WeightingConfig, WeightSource

    gradients, counts, scale = model_like(200)
    gram = RegionGram(len(scale))
    gram.add_block(gradients)
    optimal = RestWeighting(WeightingConfig(source=WeightSource.VARIANCE_OPTIMAL))
    optimal.update(*(part.tolist() for part in gram.beta(scale, np.where(np.arange(6) > 0, counts, 0))))
    row = compare_weightings(gram, counts, scale, {"optimal": optimal})[1]
    assert row.ratio + 3 * row.ratio_standard_error < 1


def test_entropy_against_score_norm() -> None:
    entropy, regions = np.array([0.1, 0.2, 0.9, 1.1]), np.array([1, 1, 2, 2])
    report = entropy_against_score(entropy, 2 * entropy, regions)
    assert report["correlation"] == pytest.approx(1.0)
    assert report["regions"]["think"] == {"tokens": 2, "entropy": 1.0, "score_norm": 2.0}
    assert entropy_against_score(entropy, np.ones(4), regions)["correlation"] is None


def test_wrong_shapes_raise() -> None:
    gram = RegionGram(3)
    with pytest.raises(ValueError, match="gradients have shape"):
        gram.add_block(np.zeros((2, 6, 4)))
    with pytest.raises(ValueError, match="coefficients have shape"):
        gram.squared_deviations(np.zeros((3, 5)))


def test_the_command_writes_json_and_figures(tmp_path: Path) -> None:
    gradients, counts, scale = model_like()
    rng = np.random.default_rng(0)
    path = tmp_path / "gradients.npz"
    np.savez(
        path,
        region_gradients=gradients,
        region_counts=counts,
        scale=scale,
        entropy=rng.random(50),
        score_norm=rng.random(50),
        region_ids=rng.integers(1, 6, size=50),
    )
    main(["--out", str(tmp_path / "out"), "--sequences", "200", "--gradients", str(path)])
    report = json.loads((tmp_path / "out" / "variance.json").read_text())
    assert report["assumptions"] == list(ASSUMPTIONS)
    assert report["model"]["variance"][0]["name"] == "uniform"
    assert set(report["model"]["entropy"]["regions"]) <= {region.name.lower() for region in TokenRegion}
    for name in ("variance_tabular.png", "variance_model.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
