"""Train on the most uncertain tokens only ("Beyond the 80/20 Rule", arXiv 2506.01939; in TRL and ms-swift).

    w_t = 1 if H_t >= tau, else 0        tau: the (1 - share) quantile of the entropies of all loss tokens of the step

The paper's threshold is that of a batch; here it is one for the whole step, so that it does not depend on how the work
is split.  Weights are not normalised: the loss is divided by all tokens or sequences, as the paper's Eq. 5 is.
Raises high-entropy tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule

__all__ = ["EntropyMask"]


@dataclass(frozen=True, kw_only=True)
class EntropyMask(CreditRule):
    """``share``: of tokens that are trained on, in (0, 1]; ties at the threshold are all kept."""

    share: float = 0.2
    traits = traits_of("entropy_mask")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}, expected a number in (0, 1]")

    def credit(self, rows: CreditRows) -> Credit:
        assert rows.entropy is not None
        size = len(rows.entropy)
        if not size:
            return Credit(weights=np.zeros(0))
        last = size - max(
            int(np.ceil(self.share * size - 1e-9)), 1
        )  # of the ordered entropies, the lowest that is kept
        threshold = np.partition(rows.entropy, last)[last]
        return Credit(weights=(rows.entropy >= threshold).astype(np.float64))
