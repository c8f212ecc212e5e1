"""The group's reward shared among siblings at each position by entropy: GTPO (arXiv 2508.04349, ICML 2026).

Of a group, n rollouts succeed and m fail (here: advantage > 0 and < 0).  d_t of the n, h_t of the m reach position t.

    r+_it =   alpha_1 + alpha_2 H_it / (sum over the n of H_kt) d_t                                           (Eq. 3)
    r-_jt = -(alpha_1 + alpha_2 (1 / H_jt) / (sum over the m of 1 / H_kt) h_t)          alpha_1 + alpha_2 = 1  (Eq. 5)
    A+ = (r+ - mean) / (std + 1e-8) over all tokens of the n;   A- likewise over those of the m               (Eq. 6)

Raises high-entropy tokens of successes, and punishes certain tokens of failures most.  Note what Eq. 6 does: each side
has mean 0, so alpha_1 cancels and half the tokens of a success are pushed down.  Rollouts of advantage 0 have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule

__all__ = ["Gtpo"]

_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class Gtpo(CreditRule):
    """``share`` is alpha_2; ``floor``: lower entropies (nats) count as it, since failures are shared by 1 / H."""

    share: float = 0.1
    floor: float = 1e-8
    traits = traits_of("gtpo")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.floor <= 0:
            raise ValueError(f"share {self.share} and floor {self.floor}: expected (0, 1] and > 0 nats")

    def credit(self, rows: CreditRows) -> Credit:
        assert rows.entropy is not None
        sign = np.sign(rows.advantages)
        side = rows.siblings * 2 + (sign > 0)
        count = np.maximum(np.bincount(side, rows.lengths * (sign != 0)), 1.0)
        part = np.maximum(rows.entropy, self.floor)
        np.reciprocal(part, out=part, where=rows.each(sign < 0))
        counted = rows.each(np.abs(sign))
        part *= counted
        total, there = rows.across(rows.index, part, counted, kind=sign > 0)
        part *= there
        part /= np.maximum(total, np.finfo(float).tiny, out=total)
        part *= self.share
        part += 1.0 - self.share
        part *= rows.each(sign)
        part -= rows.each(np.abs(sign) * (np.bincount(side, rows.sums(part)) / count)[side])
        deviation = np.sqrt(np.bincount(side, rows.sums(part * part)) / count)
        part /= rows.each((deviation + _EPSILON)[side])
        return Credit(advantages=part)
