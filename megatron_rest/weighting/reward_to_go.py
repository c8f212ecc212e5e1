"""What each token still earns, against all tokens of the step: REINFORCE++ (arXiv 2501.03262; verl's code).

    G_t = sum of rewards at t and later          A_t = (G_t - mean) / sqrt(var + 1e-8)

Mean and unbiased variance are over all loss tokens of the step, so long answers count more in both; gamma is 1.  What
an answer earned beside what was said of its tokens lies on its last one.  Nothing compares siblings: equal rewards of a
group teach something, as with ``advantage.estimator=reinforce_pp``, which does the same by rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule

__all__ = ["RewardToGo"]

_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class RewardToGo(CreditRule):
    """No options."""

    traits = traits_of("reward_to_go")

    def credit(self, rows: CreditRows) -> Credit:
        if not len(rows.sequence):
            return Credit(advantages=np.zeros(0))
        advantages = rows.returns - rows.returns.mean()
        variance = advantages @ advantages / max(len(advantages) - 1, 1)
        advantages /= np.sqrt(variance + _EPSILON)
        return Credit(advantages=advantages)
