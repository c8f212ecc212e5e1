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
        rewards = np.zeros(len(rows.sequence))
        for members in rows.families():
            mine = [rows.rows_of(i) for i in members]
            steps = []
            for one in mine:
                is_step = np.zeros(one.stop - one.start, bool)
                if rows.token_rewards is not None:
                    np.logical_not(np.isnan(rows.token_rewards[one]), out=is_step)
                is_step[-1] |= rows.unsaid[members].any()
                steps.append(is_step)
            earned = [rows.earned[one][is_step] for one, is_step in zip(mine, steps, strict=True)]
            ends = np.cumsum([len(e) for e in earned])[:-1]
            for one, is_step, values in zip(
                mine, steps, np.split(standardised(np.concatenate(earned), self.epsilon), ends), strict=True
            ):
                rewards[one][is_step] = values
        advantages = rows.from_here(rewards)
        advantages[rows.each(rows.is_left_alone)] = 0.0
        return Credit(advantages=advantages)
