"""GRPO with process supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.3): rewards of single steps of an answer.

    r~ = (r - mean) / (std + 1e-6)       over the rewards of all steps of all answers of the group; std unbiased
    A_t = sum of r~ over the steps that end at t or later

A step ends where the reward says something: a turn, a call or a token of :class:`~megatron_rest.rewards.functions.
Reward`.  What an answer earned beside them is a step that ends with its last token, if any answer of the group earned
such.  So a reward that says nothing of single tokens gives GRPO's advantages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule, standardised

__all__ = ["ProcessSupervision"]


@dataclass(frozen=True, kw_only=True)
class ProcessSupervision(CreditRule):
    """``epsilon`` is added to the standard deviation."""

    epsilon: float = 1e-6
    traits = traits_of("process")

    def credit(self, rows: CreditRows) -> Credit:
        is_step = np.zeros(len(rows.sequence), bool)
        if rows.token_rewards is not None:
            np.logical_not(np.isnan(rows.token_rewards), out=is_step)
        of_whole = np.bincount(rows.siblings, rows.unsaid != 0)[rows.siblings] > 0  # [S]
        is_step[rows.ends[of_whole[rows.sequence[rows.ends]]]] = True
        rewards = np.zeros(len(rows.sequence))
        rewards[is_step] = standardised(rows.earned[is_step], rows.siblings[rows.sequence[is_step]], self.epsilon)
        return Credit(advantages=np.where(rows.each(rows.is_left_alone), 0.0, rows.from_here(rewards)))
