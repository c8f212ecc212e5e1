"""How much format and correctness are worth at a step (a.k.a. dynamic reward): early steps pay for the format.

Each bound moves on a line from its first value (format +-2, correctness +-2) to its static one over ``schedule_steps``
and stays there.  With the defaults: format (2, -2) -> (1, -1), correctness (2, -2) -> (3, -3); the two maxima add up
to 4 at every step.  The floor of a failed format is -1 under the schedule (it reaches it half-way, its slope being the
one towards 0) and 0 without.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rest.config import RewardConfig

__all__ = ["RewardRanges", "reward_ranges"]

_START = 2.0  # published code: every bound starts at +-2
_TWO_STAGE_STEP = 30  # published variant MAX1STEP30MAX3


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardRanges:
    """What the parts are worth at one step."""

    format_pass: float
    format_fail: float
    correctness_max: float
    correctness_min: float


def reward_ranges(step: int, config: RewardConfig) -> RewardRanges:
    """Bounds at ``step`` (>= 0; the first training step is 1).  Formulas: docs/algorithm.md, "Reward"."""
    if step < 0:
        raise ValueError(f"step is {step}, expected >= 0")
    format_pass, format_fail, correctness = 1.0, 0.0, config.correctness_range
    if config.two_stage:
        late = step >= _TWO_STAGE_STEP
        format_pass, correctness = (format_pass / 2, correctness) if late else (format_pass, correctness / 3)
    if not config.schedule:
        return RewardRanges(
            format_pass=format_pass, format_fail=format_fail, correctness_max=correctness, correctness_min=-correctness
        )
    done = step / config.schedule_steps
    scheduled = min(max(_START, correctness), max(min(_START, correctness), _START + (correctness - _START) * done))
    return RewardRanges(
        format_pass=max(1.0, _START - (_START - format_pass) * done),
        format_fail=min(-1.0, -_START + (_START + format_fail) * done),
        correctness_max=scheduled,
        correctness_min=-scheduled,
    )
