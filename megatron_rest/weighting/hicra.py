"""More credit for planning tokens: HICRA ("Emergent Hierarchical Reasoning in LLMs", arXiv 2509.03646).

    A'_t = A + alpha |A|   on planning tokens        A'_t = A   elsewhere

The paper finds planning tokens in mathematical reasoning by lists of n-grams.  Here they are regions: what a tool-use
answer plans with is its thought, which the scan of its bytes finds without a list.  (The authors' code selects by
entropy instead; ``entropy_mask`` is that selection.)  Says nothing of entropy: the thought is usually uncertain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.token_region import TokenRegion
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule

__all__ = ["Hicra"]


@dataclass(frozen=True, kw_only=True)
class Hicra(CreditRule):
    """``alpha`` in [0, 1) (paper: 0.2); ``regions``: names of what plans, any of think, tool_name, tool_args,
    response, format."""

    alpha: float = 0.2
    regions: Sequence[str] = ("think",)
    traits = traits_of("hicra")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}, expected a number in [0, 1): from 1 on signs change")
        unknown = {name.upper() for name in self.regions} - set(TokenRegion.__members__)
        if unknown or not self.regions:
            known = ", ".join(region.name.lower() for region in TokenRegion if region)
            raise ValueError(f"regions are {list(self.regions)}, expected some of {known}")

    def credit(self, rows: CreditRows) -> Credit:
        is_planning = np.isin(rows.regions, [TokenRegion[name.upper()] for name in self.regions])
        more = rows.each(rows.advantages + self.alpha * np.abs(rows.advantages))
        return Credit(advantages=np.where(is_planning, more, rows.each(rows.advantages)))
