"""The baseline of least variance at every token: OTB (arXiv 2602.07078; verl's ``optimal_token_baseline``).

    W_it = sum over s <= t of (1 - 2 p_is + sum p_is^2)      p: probability of the sampled token: |e_a - p|^2
    B_t = sum_i R_it W_it / (sum_i W_it + 1e-8)              over the siblings that have a loss token at t
    A_it = R_it - B_t                                        B_t = 0 where the longest rollout is alone

R_it is what is earned from t on: the rollout's reward, unless it says what single turns, calls or tokens earned.  The
advantage estimator is not asked.  A position is counted from the rollout's
first token, tool outputs included (``otb``), or over its own tokens only (``otb_turns``, verl's ``tir_`` form for
several turns).  Siblings whose way to t was uncertain decide the baseline; by itself it raises neither certain nor
uncertain tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule

__all__ = ["OptimalTokenBaseline", "over_turns"]

_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class OptimalTokenBaseline(CreditRule):
    """``own_tokens``: count positions over sampled tokens only; ``tail``: "reward" (as verl: no baseline where a
    rollout is alone) or "zero" (no update there)."""

    own_tokens: bool = False
    tail: str = "reward"
    traits = traits_of("otb")

    def __post_init__(self) -> None:
        if self.tail not in ("reward", "zero"):
            raise ValueError(f"tail is {self.tail!r}, expected reward or zero")

    def credit(self, rows: CreditRows) -> Credit:
        assert rows.log_probs is not None and rows.sum_p2 is not None
        step = np.exp(rows.log_probs)
        step *= -2.0
        step += rows.sum_p2
        step += 1.0
        np.maximum(step, 0.0, out=step)
        table = np.zeros((len(rows.lengths), int(rows.lengths.max(initial=0))))  # a rollout a line: no sum crosses them
        is_row = np.arange(table.shape[1]) < rows.lengths[:, None]
        table[is_row] = step
        np.cumsum(table, axis=1, out=table)
        energy = table[is_row]
        reward = rows.returns
        position = rows.index if self.own_tokens else rows.place
        total, weighted, there = rows.across(position, energy, reward * energy, np.ones(len(energy)))
        siblings = np.bincount(rows.siblings, rows.lengths > 0)[rows.siblings]
        alone = 0.0 if self.tail == "reward" else np.where(rows.each(siblings) == 1, 0.0, reward)
        return Credit(advantages=reward - np.where(there == 1, alone, weighted / (total + _EPSILON)))


def over_turns(**options: Any) -> OptimalTokenBaseline:
    """``otb_turns``: positions over sampled tokens only."""
    return OptimalTokenBaseline(**({"own_tokens": True} | options))
