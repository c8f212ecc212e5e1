"""A bonus for uncertain thoughts: EGPO ("Reasoning through Exploration", arXiv 2508.05118 v4; BFCL).

    A' = A + lambda clip(H, -|A| / alpha, |A| / alpha)        H: mean entropy of the rollout's thought, nats

Clipped so that no advantage changes its sign; one number a rollout.  Raises rollouts with uncertain thoughts: the good
ones are reinforced more, the bad ones punished less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.token_region import TokenRegion
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule

__all__ = ["Egpo"]


@dataclass(frozen=True, kw_only=True)
class Egpo(CreditRule):
    """``strength`` is the paper's lambda (0.4), ``clip`` its alpha (2): the bonus is at most ``|A| / clip``."""

    strength: float = 0.4
    clip: float = 2.0
    traits = traits_of("egpo")

    def __post_init__(self) -> None:
        if self.strength < 0 or self.clip <= 0 or self.strength >= self.clip:
            raise ValueError(
                f"strength {self.strength} and clip {self.clip}: expected 0 <= strength < clip, else signs change"
            )

    def credit(self, rows: CreditRows) -> Credit:
        assert rows.entropy is not None
        entropy = rows.means(rows.entropy, rows.regions == TokenRegion.THINK)
        bound = np.abs(rows.advantages) / self.clip
        advantages = rows.advantages + self.strength * np.clip(entropy, -bound, bound)
        return Credit(advantages=rows.each(advantages))
