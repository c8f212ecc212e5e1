"""Turns modulated by their own entropy and the next one's: EMPG (arXiv 2509.09265, ICLR 2026).

    H~ = (H - min) / (max - min + 1e-8)      H: mean entropy of a turn; min, max over all turns of the step   (12)
    g = exp(-k H~) / (mean of it + 1e-8)     f = exp(-k' H~)                                                  (10, 11)
    A'_turn = A g(H_turn) + zeta f(H_next turn)      (no bonus after the last turn)                           (8)
    A''_turn = A'_turn - mean of A' over all turns of the step                                                (7)

Raises certain turns in both signs, and turns that lead to certain ones.  The authors' code is the source of the
constants and of the order of the steps (project page empgseed-seed.github.io).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule

__all__ = ["Empg"]

_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class Empg(CreditRule):
    """``k`` and ``k_future`` scale the entropies in g and f (1, 1), ``zeta`` is the weight of the bonus (0.1)."""

    k: float = 1.0
    k_future: float = 1.0
    zeta: float = 0.1
    traits = traits_of("empg")

    def credit(self, rows: CreditRows) -> Credit:
        assert rows.entropy is not None
        turns, rollouts = rows.turns
        if not len(rollouts):
            return Credit(advantages=np.zeros(0))
        entropy = np.bincount(turns, rows.entropy) / np.bincount(turns)
        entropy = (entropy - entropy.min()) / (entropy.max() - entropy.min() + _EPSILON)
        scale = np.exp(-self.k * entropy)
        scale = scale / (scale.mean() + _EPSILON)
        clarity = np.append(np.exp(-self.k_future * entropy)[1:], 0.0)
        goes_on = np.append(rollouts[1:] == rollouts[:-1], False)
        advantages = rows.advantages[rollouts] * scale + np.where(goes_on, self.zeta * clarity, 0.0)
        return Credit(advantages=(advantages - advantages.mean())[turns])
