"""The reward of one rollout; alone in its file so that data tools, which judge references, need no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RewardOutput"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardOutput:
    """Reward of one rollout, its parts separate so that each can be plotted."""

    total: float  # format + correctness, what the advantage is computed from
    format: float
    correctness: float
    is_format_valid: bool
    accuracy: float  # S_acc in [0, 1]: the correctness score before scaling; independent of the schedule
    detail: tuple[str, ...] = ()  # what was wrong, one line a finding, for people
