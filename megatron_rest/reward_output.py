"""The reward of one rollout; alone in its file so that data tools, which judge references, need no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

__all__ = ["RewardOutput"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardOutput:
    """Reward of one rollout, its parts separate so that each can be plotted.

    What a reward does not say is None: nobody claims a format or an accuracy for it.
    """

    total: float  # what the advantage is computed from
    format: float | None = None  # part of the built-in rule: total = format + correctness
    correctness: float | None = None
    is_format_valid: bool | None = None
    accuracy: float | None = None  # in [0, 1]: the correctness score before scaling; independent of the schedule
    summands: Mapping[str, float] = field(default_factory=dict)  # of the total, by name; empty: format and correctness
    parts: Mapping[str, float] = field(default_factory=dict)  # other numbers, by their names behind ``reward/``
    detail: tuple[str, ...] = ()  # what was wrong, one line a finding, for people
    token_rewards: np.ndarray | None = field(default=None, compare=False)
    """float64 [R]: what single tokens of the response earned, a part of ``total``; None: nothing was said of any."""
    is_rewarded: np.ndarray | None = field(default=None, compare=False)
    """bool [R]: the tokens that something was said of, which may be 0; None with ``token_rewards``."""
    is_judged: bool = True  # False: the reward failed; ``detail`` says why, ``total`` says nothing of the policy

    def added_up_from(self) -> dict[str, float]:
        """What ``total`` is the sum of, by name, as far as that was said."""
        if self.summands:
            return dict(self.summands)
        said = {"format": self.format, "correctness": self.correctness}
        return {name: value for name, value in said.items() if value is not None}
