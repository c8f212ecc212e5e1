"""``advantage.estimator``: from the rewards of a step to one advantage a rollout.

    R: reward     mean_g, std_g: of the rollout's group     mean_b, std_b: of all rollouts of the step

| name | advantage | source |
| --- | --- | --- |
| grpo | (R - mean_g) / (std_g + eps) | arXiv 2402.03300 |
| dr_grpo | R - mean_g | arXiv 2503.20783 |
| rloo | R - mean of the other members of the group | arXiv 2402.14740 |
| reinforce_pp | (R - mean_b) / (std_b + eps) | REINFORCE++, arXiv 2501.03262 |
| reinforce_pp_baseline | A' / (std_b(A') + eps), A' = R - mean_g | its form for groups |
| gdpo | A' / (std_b(A') + eps), A' = sum_k w_k (R_k - mean_g) / (std_g + eps) over reward parts k | arXiv 2601.05242 |

Standard deviations are unbiased (n - 1).  The last two subtract the mean of A' in their papers: it is 0, since each
group's is, so equal rewards give exactly 0 here.  REINFORCE++'s KL penalty is ``loss.kl_coef``'s affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rest.algorithms.advantages import group_relative_advantages
from megatron_rest.config import AdvantageConfig, AdvantageEstimator, ConfigError
from megatron_rest.user_code import make

__all__ = ["Estimator", "JudgedRollouts", "find_estimator"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedRollouts:
    """Rewards of the rollouts of a step that count (infrastructure has ended none of them)."""

    rewards: np.ndarray  # float64 [S]
    groups: np.ndarray  # int64 [S], siblings share one
    parts: Mapping[str, np.ndarray]  # float64 [S] each; they add up to the rewards

    def by_group(self) -> list[np.ndarray]:
        """Indices of each group's rollouts, groups in the order in which they begin."""
        order = np.argsort(self.groups, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(self.groups[order])) + 1)
        return sorted(parts, key=lambda part: int(part[0])) if len(order) else []


Estimator = Callable[[JudgedRollouts], np.ndarray]
"""Advantages, float64 ``[S]``.  Code of the user's own is a factory: ``factory(**advantage.options) -> Estimator``."""


def find_estimator(config: AdvantageConfig) -> Estimator:
    """What ``advantage`` names.  Raises ConfigError: options that it does not take, or no function."""
    name, epsilon = str(config.estimator), config.epsilon
    if ":" in name:
        estimator = make("advantage.estimator", name, config.options, "advantage.options")
        if not callable(estimator):
            raise ConfigError(
                f"advantage.estimator {name!r} makes a {type(estimator).__name__}, expected a function of "
                "JudgedRollouts"
            )
        return _Checked(name, estimator)
    if name == "gdpo":
        _only(config, {"weights"})
        return Gdpo(epsilon=epsilon, weights=config.options.get("weights", {}))
    _only(config, set())
    if name == "reinforce_pp":
        return lambda judged: _scaled(judged.rewards - judged.rewards.mean(), epsilon)
    if name == "reinforce_pp_baseline":
        return lambda judged: _scaled(_in_groups(judged, judged.rewards, "dr_grpo", epsilon), epsilon)
    return lambda judged: _in_groups(judged, judged.rewards, config.estimator, epsilon)


def _only(config: AdvantageConfig, known: set[str]) -> None:
    unknown = sorted(set(config.options) - known)
    if unknown:
        takes = f"takes {', '.join(sorted(known))}" if known else "takes none"
        raise ConfigError(f"advantage.options {', '.join(unknown)}: advantage.estimator={config.estimator} {takes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gdpo:
    """Reward parts normalised apart, so that none drowns in another's spread."""

    epsilon: float
    weights: Mapping[str, Any]  # of the parts; 1 where nothing is said

    def __call__(self, judged: JudgedRollouts) -> np.ndarray:
        unknown = sorted(set(self.weights) - set(judged.parts))
        if unknown:
            raise ConfigError(
                f"advantage.options.weights names {', '.join(unknown)}, and the reward has {', '.join(judged.parts)}"
            )
        total = np.zeros(len(judged.rewards))
        for name, values in judged.parts.items():
            advantages = _in_groups(judged, values, AdvantageEstimator.GRPO, self.epsilon)
            total += float(self.weights.get(name, 1.0)) * advantages
        return _scaled(total, self.epsilon)


@dataclass(frozen=True, slots=True)
class _Checked:
    """An estimator of the user's own: one finite number a rollout, or an error that names it."""

    name: str
    estimator: Estimator

    def __call__(self, judged: JudgedRollouts) -> np.ndarray:
        advantages = np.asarray(self.estimator(judged), np.float64)
        if advantages.shape != judged.rewards.shape or not np.isfinite(advantages).all():
            raise ValueError(
                f"advantage.estimator={self.name} gave {advantages.shape} numbers for {judged.rewards.shape} rollouts, "
                f"{int((~np.isfinite(advantages)).sum())} of them not finite: expected one finite number each"
            )
        return advantages


def _in_groups(
    judged: JudgedRollouts, values: np.ndarray, estimator: AdvantageEstimator | str, epsilon: float
) -> np.ndarray:
    advantages = np.zeros(len(values))
    of_size: dict[int, list[np.ndarray]] = {}
    for mine in judged.by_group():
        of_size.setdefault(len(mine), []).append(mine)
    for groups in of_size.values():  # a row each: thousands one after another take a while
        table = np.stack(groups)
        advantages[table] = group_relative_advantages(values[table], estimator=estimator, epsilon=epsilon)
    return advantages


def _scaled(values: np.ndarray, epsilon: float) -> np.ndarray:
    """Over their unbiased standard deviation; one value alone over 1."""
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 1.0
    return values / (deviation + epsilon)
