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
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule, runs

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
        advantages = np.empty(len(rows.sequence))
        first = rows.ends + 1 - rows.lengths[rows.lengths > 0]
        span = int((rows.token[rows.ends] - rows.token[first]).max(initial=-1)) + 1
        total, weighted, there = table = np.empty((3, span))
        for members in rows.families():  # a group at a time stays in the cache
            table[:] = 0.0
            taken = []
            for i in members:
                mine = rows.rows_of(i)
                energy = np.cumsum(_energy(rows.log_probs[mine], rows.sum_p2[mine]))
                returns = rows.rewards[i] if rows.token_rewards is None else rows.returns[mine]
                places = np.arange(len(energy)) if self.own_tokens else rows.token[mine] - rows.token[mine.start]
                pieces = runs(places, 0)
                for own, at in pieces:
                    total[at] += energy[own]
                    there[at] += 1.0
                weight = returns * energy
                for own, at in pieces:
                    weighted[at] += weight[own]
                taken.append((mine, pieces, returns))
            weighted /= total + _EPSILON
            for mine, pieces, returns in taken:
                baseline = np.empty(mine.stop - mine.start)
                alone = np.empty(len(baseline), bool)
                for own, at in pieces:
                    baseline[own] = weighted[at]
                    alone[own] = there[at] == 1.0
                if self.tail == "reward" or len(members) == 1:
                    baseline[alone] = 0.0
                else:
                    np.copyto(baseline, returns, where=alone)
                np.subtract(returns, baseline, out=advantages[mine])
        return Credit(advantages=advantages)


def _energy(log_probs: np.ndarray, sum_p2: np.ndarray) -> np.ndarray:
    """``1 - 2 p + sum p^2`` of each token, >= 0."""
    energy = np.exp(log_probs)
    energy *= -2.0
    energy += sum_p2
    energy += 1.0
    return np.maximum(energy, 0.0, out=energy)


def over_turns(**options: Any) -> OptimalTokenBaseline:
    """``otb_turns``: positions over sampled tokens only."""
    return OptimalTokenBaseline(**({"own_tokens": True} | options))
