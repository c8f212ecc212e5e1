"""A rule of one's own, as the docstring of ``megatron_rest.weighting.credit`` has it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rest.weighting import Credit, CreditRows, CreditRule, CreditTraits, Normalisation


@dataclass(frozen=True)
class LateTokens(CreditRule):
    """Later tokens weigh more, whatever became of the answer."""

    slope: float = 1.0
    traits = CreditTraits(normalisation=Normalisation.ROLLOUT)

    def credit(self, rows: CreditRows) -> Credit:
        return Credit(weights=rows.mean_one(1.0 + self.slope * rows.index / rows.each(rows.lengths)))
