"""One factor an answer, from its entropy relative to the group's: AEM (arXiv 2605.00425 v3; multi-turn agents).

    H~ = (H - min) / (max - min)      H: mean entropy of the turn; min, max over all turns of all siblings
    alpha = exp(-lambda H~) / mean over those turns of exp(-lambda H~)
    A' = alpha A                      alpha = 1 where max - min < 0.1 nats: that is noise

Raises certain turns, for both signs of the advantage (so it sharpens while most fail less, and late in training).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule

__all__ = ["Aem"]


@dataclass(frozen=True, kw_only=True)
class Aem(CreditRule):
    """``strength`` is the paper's lambda (1); ``least_range``: of the group's entropies, nats (0.1)."""

    strength: float = 1.0
    least_range: float = 0.1
    traits = traits_of("aem")

    def __post_init__(self) -> None:
        if self.strength < 0 or self.least_range <= 0:
            raise ValueError(f"strength {self.strength} and least_range {self.least_range}: expected >= 0 and > 0 nats")

    def credit(self, rows: CreditRows) -> Credit:
        assert rows.entropy is not None
        turns, rollouts = rows.turns
        entropy = np.bincount(turns, rows.entropy) / np.maximum(np.bincount(turns), 1)
        group = rows.siblings[rollouts]
        count = max(int(group.max(initial=-1)) + 1, 0)
        least, most = np.full(count, np.inf), np.full(count, -np.inf)
        np.minimum.at(least, group, entropy)
        np.maximum.at(most, group, entropy)
        spread = (most - least)[group]
        is_told = spread >= self.least_range
        factor = np.exp(-self.strength * np.where(is_told, (entropy - least[group]) / np.where(is_told, spread, 1), 0))
        mean = np.bincount(group, factor, minlength=count) / np.maximum(np.bincount(group, minlength=count), 1)
        alpha = np.where(is_told, factor / mean[group], 1.0)
        return Credit(advantages=(alpha * rows.advantages[rollouts])[turns])
