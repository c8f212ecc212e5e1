"""Turns compared with siblings' turns of the same number: MatchTIR (arXiv 2601.10712; the authors' code).

    G_j = r_j + 0.9 G_(j+1)                     r_j: reward of turn j
    A'_j = (G_j - mean) / (std + 1e-6)          over the siblings that have a turn j; std unbiased
    A_j = (A + A'_j) / 2                        on all tokens of turn j; A: the rollout's advantage

Formula, order and constants are those of the authors' code (github.com/quchangle1/MatchTIR, compute_grpo_outcome_
advantage).  A turn's reward is what the reward says of it, its calls and its tokens; what the answer earned beside them
is the last turn's, where the method has its answer's reward.  The method's own turn rewards are
:func:`megatron_rest.rewards.matched_turns.matched_turns`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule, standardised

__all__ = ["MatchTir"]


@dataclass(frozen=True, kw_only=True)
class MatchTir(CreditRule):
    """``discount`` of later turns (0.9); ``share`` of the turn's own advantage (0.5); ``epsilon`` beside the std."""

    discount: float = 0.9
    share: float = 0.5
    epsilon: float = 1e-6
    traits = traits_of("matchtir")

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1 or not 0 <= self.share <= 1:
            raise ValueError(f"discount {self.discount} and share {self.share}: expected numbers in [0, 1]")

    def credit(self, rows: CreditRows) -> Credit:
        starts = rows.turn_starts
        rollouts = rows.sequence[starts]
        if not len(starts):
            return Credit(advantages=np.zeros(0))
        to_go = np.add.reduceat(rows.earned, starts)
        number = np.arange(len(rollouts)) - np.searchsorted(rollouts, rollouts)  # of the turn in its rollout
        goes_on = np.append(rollouts[1:] == rollouts[:-1], False)
        for j in range(int(number.max(initial=0)) - 1, -1, -1):
            mine = np.flatnonzero((number == j) & goes_on)
            to_go[mine] += self.discount * to_go[mine + 1]
        cell = rows.siblings[rollouts] * (int(number.max()) + 1) + number
        order = np.argsort(cell, kind="stable")
        advantages = (1.0 - self.share) * rows.advantages[rollouts]
        for same in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1):  # turns that are compared
            advantages[same] += self.share * standardised(to_go[same], self.epsilon)
        advantages[rows.is_left_alone[rollouts]] = 0.0
        return Credit(advantages=np.repeat(advantages, np.diff(starts, append=len(rows.sequence))))
