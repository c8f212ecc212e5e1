"""Properties of the weights: mean 1, packing, masks, curriculum, measuring sources, resume."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rest.config import ConfigError, WeightingConfig, WeightSource
from megatron_rest.regions import TokenRegion
from megatron_rest.weighting import (
    RestWeighting,
    entropy_weights,
    region_sums,
    region_weight_mass,
    variance_optimal_weights,
)

FORMAT, THINK, NAME, ARGS, RESPONSE = list(TokenRegion)[1:]
PRESETS = [RestWeighting.uniform(), RestWeighting.paper(), RestWeighting()]
sequences = st.lists(st.integers(0, 5), min_size=1, max_size=50)


def measuring(source: str, **fields: float) -> RestWeighting:
    return RestWeighting(WeightingConfig(source=WeightSource(source), **fields))  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ids=sequences, seed=st.integers(0, 99), progress=st.floats(0, 1), preset=st.sampled_from(PRESETS))
def test_mean_one_over_valid_tokens_and_zero_elsewhere(
    ids: list[int], seed: int, progress: float, preset: RestWeighting
) -> None:
    region_ids = np.array(ids, dtype=np.int8)
    mask = np.random.default_rng(seed).random(len(ids)) < 0.7
    weights = preset(region_ids, progress=progress, loss_mask=mask)
    valid = mask & (region_ids != 0)
    assert weights.dtype == np.float32
    assert (weights[~valid] == 0).all()
    if valid.any():
        assert (weights[valid] > 0).all()
        assert weights[valid].mean(dtype=np.float64) == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batch=st.lists(sequences, min_size=1, max_size=6), progress=st.floats(0, 1), seed=st.integers(0, 99))
def test_packed_in_any_order_is_bit_identical_to_alone(batch: list[list[int]], progress: float, seed: int) -> None:
    weighting = RestWeighting.paper()
    ids = np.concatenate([np.array(s, dtype=np.int64) for s in batch])
    owner = np.repeat(np.arange(len(batch)) * 7 + 3, [len(s) for s in batch])
    order = np.random.default_rng(seed).permutation(len(ids))  # not even contiguous
    packed = weighting.packed(ids[order], owner[order], progress=progress)
    alone = np.concatenate([weighting(np.array(s), progress=progress) for s in batch])
    np.testing.assert_array_equal(packed, alone[order])
    as_torch = weighting.packed(torch.from_numpy(ids[order]), torch.from_numpy(owner[order]), progress=progress)
    assert isinstance(as_torch, torch.Tensor)
    assert not as_torch.requires_grad
    np.testing.assert_array_equal(as_torch.numpy(), packed)


def test_padding_of_a_pack_is_ignored() -> None:
    ids, owner = torch.tensor([2, 3, 1, 2]), torch.tensor([0, 0, -1, -1])
    weights = RestWeighting().packed(ids, owner, progress=0.0)
    assert weights.tolist() == [*RestWeighting()(ids[:2], progress=0.0).tolist(), 0.0, 0.0]


def test_uniform_is_exactly_one() -> None:
    ids = torch.randint(1, 6, (257,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(RestWeighting.uniform()(ids, progress=0.3), torch.ones(257))


def test_empty_and_all_masked_sequences() -> None:
    assert RestWeighting()(np.zeros(0, dtype=np.int8), progress=0.0).shape == (0,)
    assert RestWeighting()(np.array([0, 0]), progress=0.0).tolist() == [0, 0]
    assert (
        RestWeighting().packed(torch.tensor([2]), torch.tensor([0]), progress=0.0, loss_mask=torch.tensor([False])) == 0
    )


@pytest.mark.parametrize("weighting", [RestWeighting.paper(), RestWeighting(), measuring("entropy_ema")])
def test_curriculum_is_monotone_and_capped(weighting: RestWeighting) -> None:
    if weighting.statistic:
        weighting.update([0, 0.5, 8.0, 0.5, 2.0, 8.0], [0, 10, 10, 10, 10, 10])
    table = np.stack([weighting.region_weights(p) for p in np.linspace(0, 1, 11)])
    config = weighting.config
    assert (np.diff(table[:, [THINK, ARGS, RESPONSE]], axis=0) >= 0).all()
    assert (np.diff(table[:, FORMAT]) <= 0).all()
    assert (table[:, NAME] == table[0, NAME]).all()
    assert table[:, 1:].min() >= config.min_weight
    assert table[:, 1:].max() <= config.max_weight
    if not weighting.statistic:
        assert table[:, ARGS].max() <= config.max_args
        assert table[:, THINK].max() <= config.max_think


def test_curriculum_ends() -> None:
    np.testing.assert_allclose(RestWeighting.paper().region_weights(1.0)[1:], [0.79, 0.81, 1.2, 0.81, 0.81])
    capped = RestWeighting.paper(alpha_args=5.0, alpha_think=5.0, alpha_format=5.0)
    np.testing.assert_allclose(capped.region_weights(1.0)[1:], [0.001, 1.0, 1.2, 1.2, 0.81])


def test_a_region_can_be_switched_off() -> None:
    """The paper's ablation without gradient for the thought; the mean stays 1 over ALL valid tokens."""
    weighting = RestWeighting.paper(gamma_think=0.0, alpha_think=0.0)
    weights = weighting(np.array([THINK, THINK, NAME, FORMAT]), progress=0.5)
    assert (weights[:2] == 0).all()
    assert weights.mean() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_out_of_range(progress: float) -> None:
    for weighting in PRESETS:
        with pytest.raises(ValueError, match="progress is"):
            weighting(np.array([1]), progress=progress)


def test_wrong_shapes_raise() -> None:
    weighting = RestWeighting()
    with pytest.raises(ValueError, match="expected \\[L\\]"):
        weighting(np.ones((2, 3), dtype=np.int8), progress=0.0)
    with pytest.raises(ValueError, match="loss_mask has shape"):
        weighting(np.ones(3, dtype=np.int8), progress=0.0, loss_mask=np.ones(2, dtype=bool))
    with pytest.raises(ValueError, match="sequence_ids has shape"):
        weighting.packed(np.ones(3, dtype=np.int8), np.ones(2, dtype=np.int64), progress=0.0)


def test_bad_configuration_raises() -> None:
    for fields in (
        {"gamma_name": -1.0},
        {"min_weight": 0.0},
        {"min_weight": 9.0},
        {"entropy_decay": 1.0},
        {"entropy_rule": "x"},
    ):
        with pytest.raises(ConfigError):
            WeightingConfig(**fields)  # type: ignore[arg-type]


def test_region_sums_add_up_over_any_split_and_ignore_nan() -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 6, (60,), generator=generator)
    values = torch.rand(60, generator=generator)
    mask = torch.rand(60, generator=generator) < 0.5
    poisoned = torch.where(mask & (ids > 0), values, torch.nan)
    sums, counts = region_sums(poisoned, ids, mask)
    assert sums[0] == counts[0] == 0
    for region in range(1, 6):
        chosen = values[mask & (ids == region)]
        assert sums[region] == pytest.approx(chosen.double().sum().item())
        assert counts[region] == len(chosen)
    parts = [region_sums(poisoned[a:b], ids[a:b], mask[a:b]) for a, b in itertools.pairwise([0, 7, 7, 41, 60])]
    torch.testing.assert_close(sum(p[0] for p in parts), sums, rtol=1e-12, atol=0)
    assert torch.equal(sum(p[1] for p in parts), counts)


def test_entropy_source_follows_the_rule() -> None:
    weighting = measuring("entropy_ema")
    assert weighting.statistic == "entropy"
    np.testing.assert_array_equal(
        weighting.region_weights(0.0), RestWeighting().region_weights(0.0)
    )  # nothing measured
    weighting.update([0, 0.2, 8.0, 0.5, 2.0, 0], [0, 10, 10, 10, 10, 0])
    entropy = np.array([0.02, 0.8, 0.05, 0.2])
    rule = entropy_weights(entropy)
    raw = weighting.region_weights(0.0)
    assert raw[THINK] == pytest.approx(0.6)  # the scale: think starts at its gamma
    np.testing.assert_allclose(raw[[FORMAT, THINK, NAME, ARGS]], np.clip(0.6 * rule / rule[1], 0.001, 8.0), rtol=1e-12)
    assert raw[RESPONSE] == 0.6  # not measured: the constant


def test_the_curriculum_moves_measured_weights_as_it_moves_the_constants() -> None:
    slopes = {"alpha_format": 0.2, "alpha_args": 0.05, "alpha_think": 0.1, "alpha_response": 0.15}
    weighting = measuring("entropy_ema", **slopes)
    weighting.update([0, 3.0, 4.0, 3.5, 3.0, 4.5], [0, 10, 10, 10, 10, 10])
    start = weighting.region_weights(0.0)
    for progress in (0.25, 1.0):
        moved = weighting.region_weights(progress) - start
        expected = progress * np.array([-0.2, 0.1, 0.0, 0.05, 0.15])
        np.testing.assert_allclose(moved[[FORMAT, THINK, NAME, ARGS, RESPONSE]], expected, atol=1e-12)


def test_entropy_of_one_sequence_without_a_trainer() -> None:
    weighting = measuring("entropy_ema")
    ids = np.array([FORMAT, THINK, THINK, NAME])
    entropy = np.array([0.1, 1.0, 0.6, 0.1])
    weights = weighting(ids, progress=0.0, entropy=entropy)
    rule = entropy_weights(np.array([0.1, 0.8, 0.8, 0.1]))
    np.testing.assert_allclose(weights, rule / rule.mean(), rtol=1e-6)
    assert np.isnan(weighting.means.mean).all()  # the running means are untouched


def test_moving_average_and_exact_resume() -> None:
    weighting = measuring("entropy_ema", entropy_decay=0.5)
    weighting.update([0, 1, 2, 3, 4, 0], [0, 10, 10, 10, 10, 0])
    weighting.update([0, 3, 0, 9, 4, 1], [0, 10, 0, 10, 10, 3])
    np.testing.assert_allclose(weighting.means.mean[1:], [0.2, 0.2, 0.6, 0.4, 1 / 3])
    resumed = measuring("entropy_ema", entropy_decay=0.5)
    resumed.load_state_dict(json.loads(json.dumps(weighting.state_dict())))
    np.testing.assert_array_equal(resumed.means.mean, weighting.means.mean)
    assert resumed.state_dict() == weighting.state_dict()
    with pytest.raises(ValueError, match="has shape"):
        resumed.load_state_dict({"mean": [1.0]})


def test_offline_keeps_the_first_measurement() -> None:
    weighting = measuring("entropy_offline")
    weighting.update([0, 1, 2, 3, 4, 0], [0, 10, 10, 10, 10, 0])
    first = weighting.means.mean
    weighting.update([0, 5, 5, 5, 5, 5], [0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(weighting.means.mean[:5], first[:5])
    assert weighting.means.mean[RESPONSE] == 5  # seen for the first time now


def test_nan_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match="check the scoring pass"):
        measuring("entropy_ema").update([0, float("nan"), 0, 0, 0, 0], [0, 1, 0, 0, 0, 0])


def test_variance_optimal_by_region_and_by_token() -> None:
    wide = measuring("variance_optimal", min_weight=1e-9, max_weight=1e9)
    assert wide.statistic == "beta"
    wide.update([0, 4.0, 1.0, 2.0, 8.0, 0], [0, 1, 1, 1, 1, 0])
    raw = wide.region_weights(1.0)  # no curriculum: it would leave the minimum
    np.testing.assert_allclose(raw[[FORMAT, THINK, NAME, ARGS]] / raw[THINK], [0.25, 1.0, 0.5, 0.125])
    beta = np.array([1.0, 2.0, 4.0, np.nan])
    weights = wide(np.array([2, 2, 3, 0]), progress=0.0, beta=beta)
    np.testing.assert_allclose(weights[:3], variance_optimal_weights(beta[:3]), rtol=1e-6)
    assert weights[3] == 0
    packed = wide.packed(np.array([2, 2, 3, 0, 2]), np.array([5, 5, 5, 5, 6]), progress=0.0, beta=np.append(beta, 9.0))
    np.testing.assert_allclose(packed, [*weights, 1.0], rtol=1e-6)


def test_a_token_without_score_gets_the_cap_not_infinity() -> None:
    weights = measuring("variance_optimal")(np.array([2, 2, 2]), progress=0.0, beta=np.array([0.0, 1.0, 1.0]))
    assert np.isfinite(weights).all()
    assert weights[0] / weights[1] == pytest.approx(8.0 / (0.6 * 2 / 3))


def test_weight_mass_is_a_pair_of_sums() -> None:
    ids = np.array([FORMAT, THINK, THINK, NAME, 0])
    weights = RestWeighting()(ids, progress=0.0)
    mass = region_weight_mass(weights, ids)
    shares = {name: (part / total).item() for name, (part, total) in mass.items()}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["weight_mass/think"] == pytest.approx(1.2 / 3.4, rel=1e-6)
    assert shares["weight_mass/response"] == 0
