"""What is known of a row of logits without the row: statistics of parts of it, their fold, and its gradient's rule.

Over any set of columns (a shard, a tile), with x the logits and T the temperature:

    m = max x     Z = sum e^((x-m)/T)     U = sum ((x-m)/T) e^((x-m)/T)     Q = sum e^(2(x-m)/T)     t = x_label or 0

Sets merge exactly, in any number, with d_i = (m_i - m)/T:

    Z = sum e^d_i Z_i     U = sum e^d_i (U_i + d_i Z_i)     Q = sum e^(2 d_i) Q_i     t = sum t_i

and finish as  log p(label) = (t - m)/T - log Z,   H = log Z - U/Z,   sum p^2 = Q / Z^2.

Two choices keep fp32 exact.  ``U`` is centred (the uncentred sum x e^x loses 3e-4 nats when logits sit near 1000), and
``m`` and ``t`` stay unscaled, so that the temperature multiplies a small difference and never a large logit.

The gradient needs m, log Z and H of a row only (12 bytes), g = dL/dlog_probs and h = dL/dentropy:

    dL/dx_j = (g 1{j = label} - p_j (g + h (log p_j + H))) / T  =  g 1{j = label} / T + e_j (slope a_j + intercept)

where a_j = (x_j - m)/T, e_j = e^(a_j), slope = -h / (Z T), intercept = -(g + h (H - log Z)) / (Z T).

Sources: online softmax (arXiv 1805.02867) for the merge; the entropy terms follow by differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FLOOR", "GradientRule", "RowStatistics", "compute_dtype", "fold_partials", "merge_partials"]

# Stands for the maximum of columns that are all -inf or absent.  Finite, because -inf - -inf is NaN; far below any
# logit, because e^(floor - m) must vanish; far above -3.4e38, because temperatures down to 1e-6 divide it.
FLOOR = -1.0e30


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """fp32 for every storage dtype, except that float64 stays float64 (references, gradient checks)."""
    return torch.float64 if storage == torch.float64 else torch.float32


class RowStatistics(NamedTuple):
    """What a row needs for its results and its gradient, each ``[n]``, the same on every rank."""

    max_logit: Tensor  # m, unscaled
    log_sum: Tensor  # log Z, relative to m
    entropy: Tensor  # H in nats
    log_probs: Tensor  # of the labels, nats
    collision: Tensor | None  # sum of p^2


def merge_partials(parts: Tensor, inverse_temperature: float) -> Tensor:
    """``[S, K, n]`` of S disjoint sets of columns, in their order -> ``[K, n]`` of their union."""
    if len(parts) == 1:
        return parts[0]
    m = parts[:, 0].amax(0)
    d = (parts[:, 0] - m) * inverse_temperature
    w = d.exp()
    z = (w * parts[:, 1]).sum(0)
    u = (w * (parts[:, 2] + d * parts[:, 1])).sum(0)
    merged = [m, z, u, parts[:, 3].sum(0)]
    if parts.shape[1] == 5:
        merged.append((w.square() * parts[:, 4]).sum(0))
    return torch.stack(merged)


def fold_partials(gathered: Tensor, inverse_temperature: float) -> RowStatistics:
    """Results of ``[TP, K, n]`` partials in rank order: the same bits on every rank."""
    m, z, u, label_logit, *q = merge_partials(gathered, inverse_temperature)
    log_sum = z.log()
    return RowStatistics(
        max_logit=m.clone(),  # kept for the backward pass, without the rest of the partials
        log_sum=log_sum,
        entropy=log_sum - u / z,
        log_probs=(label_logit - m) * inverse_temperature - log_sum,
        collision=q[0] / z.square() if q else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientRule:
    """How the gradient of a row follows from its exponents a: ``g 1{label} / T + e^a (slope a + intercept)``."""

    max_logit: Tensor  # [n]
    slope: Tensor | None  # [n]; None where the entropy has no gradient
    intercept: Tensor  # [n]
    at_label: Tensor  # [n], g / T
    is_active: Tensor  # bool [n]; False = exactly zero gradient whatever the logits hold, NaN included
    is_finite: bool = False  # no logit is -inf, as ``write_partials`` found

    @classmethod
    def create(
        cls,
        *,
        max_logit: Tensor,
        log_sum: Tensor,
        entropy: Tensor,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        inverse_temperature: float,
        is_finite: bool = False,
    ) -> GradientRule:
        """From row statistics, g = dL/dlog_probs and h = dL/dentropy (None = no such term), each ``[n]``."""
        g, h = grad_log_probs, grad_entropy
        scale = torch.exp(-log_sum) * inverse_temperature  # 1 / (Z T)
        slope = None if h is None else -h * scale
        intercept = -g * scale if h is None else -(g + h * (entropy - log_sum)) * scale
        is_active = g != 0 if h is None else (g != 0) | (h != 0)
        if is_finite and slope is not None:  # a is above -3.5e38: a larger slope could take it to -inf after all
            is_finite = bool((slope.abs() <= 1.0).all())
        return cls(
            max_logit=max_logit,
            slope=slope,
            intercept=intercept,
            at_label=g * inverse_temperature,
            is_active=is_active,
            is_finite=is_finite,
        )

    def __getitem__(self, at: slice) -> GradientRule:
        return GradientRule(
            max_logit=self.max_logit[at],
            slope=None if self.slope is None else self.slope[at],
            intercept=self.intercept[at],
            at_label=self.at_label[at],
            is_active=self.is_active[at],
            is_finite=self.is_finite,
        )
