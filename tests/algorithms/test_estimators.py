"""Advantage estimators against their definitions, and what the judge makes of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from megatron_rest.algorithms import JudgedRollouts, find_estimator, group_relative_advantages
from megatron_rest.config import ADVANTAGE_NAMES, AdvantageConfig, ConfigError

REWARDS = [np.array([4.0, 1.0, 1.0, -2.0]), np.array([0.5, 0.5, 0.5]), np.array([3.0]), np.array([1.0, -1.0])]
FORMAT = [np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.5, 0.5, 0.5]), np.array([1.0]), np.array([0.0, 1.0])]
EPSILON = 1e-6


def judged() -> JudgedRollouts:
    rewards, formats = np.concatenate(REWARDS), np.concatenate(FORMAT)
    groups = np.repeat([7, 3, 5, 4], [len(r) for r in REWARDS])
    return JudgedRollouts(rewards=rewards, groups=groups, parts={"format": formats, "correctness": rewards - formats})


def deviation(values: np.ndarray) -> float:
    return float(np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1)))


def in_groups(values: list[np.ndarray]) -> np.ndarray:
    """GRPO's, group by group, a loop at a time."""
    out = []
    for group in values:
        for r in group:
            alone = len(group) == 1
            mean, std = (0.0, 1.0) if alone else (group.mean(), deviation(group))
            out.append((r - mean) / (std + EPSILON))
    return np.array(out)


def centred() -> np.ndarray:
    return np.concatenate([g - g.mean() if len(g) > 1 else g for g in REWARDS])


def expected(name: str) -> np.ndarray:
    rewards = np.concatenate(REWARDS)
    match name:
        case "grpo":
            return in_groups(REWARDS)
        case "dr_grpo":
            return centred()
        case "rloo":
            others = [[r - (g.sum() - r) / (len(g) - 1) if len(g) > 1 else r for r in g] for g in REWARDS]
            return np.array([a for g in others for a in g])
        case "reinforce_pp":
            return (rewards - rewards.mean()) / (deviation(rewards) + EPSILON)
        case "reinforce_pp_baseline":
            return centred() / (deviation(centred()) + EPSILON)
        case "gdpo":
            correctness = [r - f for r, f in zip(REWARDS, FORMAT, strict=True)]
            total = in_groups(FORMAT) + in_groups(correctness)
            return total / (deviation(total) + EPSILON)
    raise AssertionError(name)


@pytest.mark.parametrize("name", ADVANTAGE_NAMES)
def test_estimators(name):
    found = find_estimator(AdvantageConfig(estimator=name))(judged())
    np.testing.assert_allclose(found, expected(name), rtol=1e-12, atol=1e-12)
    if name != "reinforce_pp":
        assert (found[4:7] == 0).all(), "equal rewards teach nothing, exactly"


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_groups_are_what_they_were(name):
    found = find_estimator(AdvantageConfig(estimator=name))(judged())
    want = np.concatenate([group_relative_advantages(g, estimator=name) for g in REWARDS])
    np.testing.assert_array_equal(found, want)


def test_gdpo_weighs_its_parts():
    only = AdvantageConfig(estimator="gdpo", options={"weights": {"correctness": 0.0}})
    found = find_estimator(only)(judged())
    np.testing.assert_allclose(found, in_groups(FORMAT) / (deviation(in_groups(FORMAT)) + EPSILON), atol=1e-12)
    with pytest.raises(ConfigError, match="names style, and the reward has format, correctness"):
        find_estimator(AdvantageConfig(estimator="gdpo", options={"weights": {"style": 1.0}}))(judged())


def best_of(*, share: float = 0.5) -> Callable[[JudgedRollouts], np.ndarray]:
    """An estimator of one's own: the upper part of all rollouts up, the others down."""
    return lambda rollouts: np.where(rollouts.rewards >= np.quantile(rollouts.rewards, 1 - share), 1.0, -1.0)


def broken() -> Callable[[JudgedRollouts], np.ndarray]:
    return lambda rollouts: np.full(len(rollouts.rewards), np.nan)


def test_ones_own_by_name():
    here = "tests.algorithms.test_estimators"
    found = find_estimator(AdvantageConfig(estimator=f"{here}:best_of", options={"share": 0.3}))(judged())
    assert found.tolist() == np.where(np.concatenate(REWARDS) >= 1.0, 1.0, -1.0).tolist()
    with pytest.raises(ConfigError, match=r"takes .*share"):
        find_estimator(AdvantageConfig(estimator=f"{here}:best_of", options={"part": 0.3}))
    with pytest.raises(ConfigError, match="expected a function"):
        find_estimator(AdvantageConfig(estimator=f"{here}:centred"))
    with pytest.raises(ValueError, match="10 of them not finite"):
        find_estimator(AdvantageConfig(estimator=f"{here}:broken"))(judged())


def test_options_nobody_takes():
    with pytest.raises(ConfigError, match=r"advantage.options weights: advantage.estimator=grpo takes none"):
        find_estimator(AdvantageConfig(options={"weights": {}}))
    with pytest.raises(ConfigError, match="did you mean rloo"):
        AdvantageConfig(estimator="rlo")
