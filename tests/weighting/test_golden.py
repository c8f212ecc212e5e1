"""Golden vectors of the weights: columns F and P of every text, entropy rules, theorems (specification, section f)."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rest.config import WeightingConfig, WeightSource
from megatron_rest.regions import TOOLRL_TAGS_ONLY, TokenRegion, label_regions
from megatron_rest.weighting import RestWeighting, entropy_weights, score_norm_bound, variance_optimal_weights
from tests.regions.golden import TEXTS, pieces

FORMAT, THINK, NAME, ARGS, RESPONSE = list(TokenRegion)[1:]
TOLERANCE = 1e-6  # the vectors are printed with six decimals

COLUMN_F = {
    "A": {FORMAT: 1.151515, THINK: 0.690909, NAME: 1.381818, ARGS: 0.690909},
    "B": {FORMAT: 1.142857, THINK: 0.685714, NAME: 1.371429, ARGS: 0.685714},
    "C": {FORMAT: 1.202532, THINK: 0.721519, RESPONSE: 0.721519},
    "D": {FORMAT: 1.608696, THINK: 0.965217},
    "E": {FORMAT: 1.037037, THINK: 0.622222, NAME: 1.244444, ARGS: 0.622222},
    "F": {FORMAT: 1.132075, THINK: 0.679245, NAME: 1.358491, ARGS: 0.679245},
    "G": {FORMAT: 1.12069, THINK: 0.672414, NAME: 1.344828, ARGS: 0.672414},
    "H": {FORMAT: 1.151515, THINK: 0.690909, NAME: 1.381818, ARGS: 0.690909},
    "J": {FORMAT: 1.0},
}
# text -> (number of positive weights, weight by region)
COLUMN_P = {
    "A": (18, {FORMAT: 1.384615, THINK: 0.830769, NAME: 1.661538, ARGS: 0.830769}),
    "B": (27, {FORMAT: 1.421053, THINK: 0.852632, NAME: 1.705263, ARGS: 0.852632}),
    "C": (14, {FORMAT: 1.166667, THINK: 0.7, RESPONSE: 0.0}),
    "D": (36, {FORMAT: 1.636364, THINK: 0.981818}),
    "E": (8, {FORMAT: 1.142857, THINK: 0.685714, NAME: 1.371429, ARGS: 0.685714}),
    "F": (16, {FORMAT: 1.355932, THINK: 0.813559, NAME: 1.627119, ARGS: 0.813559}),
    "G": (19, {FORMAT: 1.283784, THINK: 0.77027, NAME: 1.540541, ARGS: 0.77027}),
    "H": (18, {FORMAT: 1.384615, THINK: 0.830769, NAME: 1.661538, ARGS: 0.830769}),
    "J": (0, {}),
}


def check(weights: np.ndarray, region_ids: np.ndarray, expected: dict[TokenRegion, float]) -> None:
    assert {int(r) for r in region_ids if r} == {int(r) for r in expected}
    for region, value in expected.items():
        np.testing.assert_allclose(weights[region_ids == region], value, atol=TOLERANCE)
    assert (weights[region_ids == TokenRegion.CONTEXT] == 0).all()


@pytest.mark.parametrize("name", TEXTS)
def test_column_f(name: str) -> None:
    region_ids = label_regions(pieces(TEXTS[name]))
    for weighting in (RestWeighting(), RestWeighting.paper()):
        weights = weighting(region_ids, progress=0.0)
        check(weights, region_ids, COLUMN_F[name])
        assert weights.mean() == pytest.approx(1.0, abs=TOLERANCE)


@pytest.mark.parametrize("name", TEXTS)
def test_column_p(name: str) -> None:
    region_ids = label_regions(pieces(TEXTS[name]), dialect=TOOLRL_TAGS_ONLY)
    weights = RestWeighting.reference_code()(region_ids, progress=0.0)
    num_positive, expected = COLUMN_P[name]
    assert (weights > 0).sum() == num_positive
    check(weights, region_ids, expected)
    if num_positive:
        assert weights[weights > 0].mean() == pytest.approx(1.0, abs=TOLERANCE)


def test_padding_changes_nothing() -> None:
    region_ids = label_regions(pieces(TEXTS["A"]))
    padded = np.concatenate([region_ids, np.full(3, FORMAT, dtype=np.int8)])
    mask = np.arange(len(padded)) < len(region_ids)
    weights = RestWeighting()(padded, progress=0.0, loss_mask=mask)
    np.testing.assert_array_equal(weights[:-3], RestWeighting()(region_ids, progress=0.0))
    assert (weights[-3:] == 0).all()


@pytest.mark.parametrize("step", [0, 1, 50, 100, 105, 200, 300])
def test_reference_gammas_by_step(step: int) -> None:
    """gamma_args = min(1.2, .6 + .002 s), gamma_think = min(1, .6 + .002 s): the published schedule."""
    raw = RestWeighting.reference_code(total_steps=300).region_weights(step / 300)
    expected = [0.0, 1.0, min(1.0, 0.6 + 0.002 * step), 1.2, min(1.2, 0.6 + 0.002 * step), 0.0]
    np.testing.assert_allclose(raw, expected, atol=1e-12)


def test_configured_published_weights_are_the_preset() -> None:
    """``weighting.source=reference_code`` alone gives them: no other field has to be known."""
    config = WeightingConfig(source=WeightSource.REFERENCE_CODE, alpha_format=0.5, gamma_response=2.0)
    region_ids = np.array([FORMAT, NAME, ARGS, THINK, RESPONSE, 0, THINK], dtype=np.int8)
    for progress in (0.0, 0.3, 1.0):
        ours = RestWeighting.from_config(config)(region_ids, progress=progress)
        np.testing.assert_array_equal(ours, RestWeighting.reference_code()(region_ids, progress=progress))
        gamma = 0.6 + 0.21 * progress
        raw = np.array([1.0, 1.2, gamma, gamma, 0.0, 0.0, gamma])
        np.testing.assert_allclose(ours, raw / raw[raw > 0].mean(), rtol=1e-6)


# Text A with full coverage: 24 format-class, 1 name, 8 arguments, 5 think tokens.
_COUNTS = np.array([24, 1, 8, 5])
_ENTROPY = np.array([0.02, 0.05, 0.20, 0.80])


@pytest.mark.parametrize(
    ("rule", "raw", "mean", "normalised", "clamped"),
    [
        (
            "score_bound",
            [50.501667, 20.504166, 5.516656, 1.815966],
            33.835717,
            [1.492555, 0.605992, 0.163042, 0.05367],
            [1.20057, 1.20057, 0.827891, 0.272524],
        ),
        (
            "inverse",
            [50, 20, 5, 1.25],
            33.322368,
            [1.500494, 0.600197, 0.150049, 0.037512],
            [1.234518, 1.234518, 0.771574, 0.192893],
        ),
    ],
)
def test_entropy_rules(rule: str, raw: list[float], mean: float, normalised: list[float], clamped: list[float]) -> None:
    weights = entropy_weights(_ENTROPY, rule=rule)
    np.testing.assert_allclose(weights, raw, atol=TOLERANCE)
    average = (weights * _COUNTS).sum() / _COUNTS.sum()
    assert average == pytest.approx(mean, abs=TOLERANCE)
    np.testing.assert_allclose(weights / average, normalised, atol=TOLERANCE)
    clipped = np.clip(weights, 0.001, 8.0)
    np.testing.assert_allclose(clipped * _COUNTS.sum() / (clipped * _COUNTS).sum(), clamped, atol=TOLERANCE)


def test_lemma_2_and_theorem_2() -> None:
    p = np.array([0.7, 0.2, 0.1])
    entropy = -(p * np.log(p)).sum()
    assert 1 - (p**2).sum() == pytest.approx(0.46)
    assert entropy == pytest.approx(0.801819, abs=TOLERANCE)
    assert score_norm_bound(entropy) == pytest.approx(0.551487, abs=TOLERANCE)
    beta = np.array([1.0, 2.0, 4.0])
    weights = variance_optimal_weights(beta)
    np.testing.assert_allclose(weights, [1.714286, 0.857143, 0.428571], atol=TOLERANCE)
    assert (beta * weights**2).sum() == pytest.approx(5.142857, abs=TOLERANCE)
    assert beta.sum() == 7
