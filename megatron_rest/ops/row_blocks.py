"""Row arithmetic of the policy head: partial statistics of a block of logits, their fold, and the way back.

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

The work goes in blocks of rows small enough that every pass but the first hits the L2 cache; passes write into two
scratch blocks.  Sources: online softmax (arXiv 1805.02867) for the merge; the entropy terms follow by differentiation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rest.ops.sharding import VocabShard

__all__ = [
    "RowStatistics",
    "Scratch",
    "block_gradient",
    "block_partials",
    "compute_dtype",
    "fold_partials",
    "row_blocks",
]

# Stands for the maximum of columns that are all -inf or absent.  Finite, because -inf - -inf is NaN; far below any
# logit, because e^(floor - m) must vanish; far above -3.4e38, because temperatures down to 1e-6 divide it.
_FLOOR = -1.0e30

# Elements of a scratch block.  On CPU two fp32 blocks (1 MiB) and the rows they come from stay in a 2 MiB L2 cache;
# on a GPU the eager passes only need enough work to fill the device.
_CPU_BLOCK_ELEMENTS = 1 << 17
_GPU_BLOCK_ELEMENTS = 1 << 24


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """fp32 for every storage dtype, except that float64 stays float64 (references, gradient checks)."""
    return torch.float64 if storage == torch.float64 else torch.float32


def row_blocks(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of consecutive rows that one scratch block holds."""
    step = rows_per_block(num_columns, device)
    for begin in range(0, num_rows, step):
        yield slice(begin, min(begin + step, num_rows))


def rows_per_block(num_columns: int, device: torch.device) -> int:
    elements = _CPU_BLOCK_ELEMENTS if device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    return max(1, elements // max(1, num_columns))


class Scratch:
    """The two buffers that a block's passes write into: exponents and exponentials."""

    def __init__(self, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> None:
        rows = min(num_rows, rows_per_block(num_columns, device))
        self._exponents = torch.empty(rows, num_columns, dtype=dtype, device=device)
        self._exponentials = torch.empty_like(self._exponents)

    def of(self, num_rows: int) -> tuple[Tensor, Tensor]:
        return self._exponents[:num_rows], self._exponentials[:num_rows]


class RowStatistics(NamedTuple):
    """What a row needs for its results and its gradient, each ``[n]``, the same on every rank."""

    max_logit: Tensor  # m, unscaled
    log_sum: Tensor  # log Z, relative to m
    entropy: Tensor  # H in nats
    log_probs: Tensor  # of the labels, nats
    collision: Tensor | None  # sum of p^2


def block_partials(
    rows: Tensor, labels: Tensor, shard: VocabShard, inverse_temperature: float, out: Tensor, scratch: Scratch
) -> None:
    """Fill ``out [K, r]`` with (m, Z, U, t), and Q where K is 5, of ``rows [r, V/TP]`` of any floating dtype."""
    if shard.num_columns == 0:
        out.zero_()
        out[0] = _FLOOR
        return
    x = rows[:, : shard.num_columns]
    a, e = scratch.of(len(x))
    if x.dtype == a.dtype:
        out[0] = x.amax(-1)
    else:
        out[0] = a.copy_(x).amax(-1)  # the widened copy is reduced much faster than bf16 on CPU
        x = a
    out[0].clamp_(min=_FLOOR)
    _exponents(x, out[0], inverse_temperature, a)
    torch.exp(a, out=e)
    out[1] = e.sum(-1)
    out[2] = a.mul_(e).sum(-1)
    column, is_local = shard.local_columns(labels)
    out[3] = torch.where(is_local, rows.gather(1, column[:, None])[:, 0].to(out.dtype), 0.0)
    if len(out) == 5:
        out[4] = e.square_().sum(-1)


def _exponents(x: Tensor, max_logit: Tensor, inverse_temperature: float, out: Tensor) -> None:
    """``out = (x - m) / T`` with -inf replaced by a finite floor, since -inf * e^-inf is NaN where 0 is meant."""
    torch.sub(x, max_logit[:, None], out=out)
    if inverse_temperature != 1.0:
        out.mul_(inverse_temperature)
    out.clamp_(min=_FLOOR)


def fold_partials(gathered: Tensor, inverse_temperature: float) -> RowStatistics:
    """Merge ``[S, K, n]`` partials of S shards in their order: the same bits on every rank."""
    m = gathered[:, 0].amax(0)
    d = (gathered[:, 0] - m) * inverse_temperature
    w = d.exp()
    z = (w * gathered[:, 1]).sum(0)
    u = (w * (gathered[:, 2] + d * gathered[:, 1])).sum(0)
    label_logit = gathered[:, 3].sum(0)
    log_sum = z.log()
    return RowStatistics(
        max_logit=m,
        log_sum=log_sum,
        entropy=log_sum - u / z,
        log_probs=(label_logit - m) * inverse_temperature - log_sum,
        collision=(w.square() * gathered[:, 4]).sum(0) / z.square() if gathered.shape[1] == 5 else None,
    )


def block_gradient(
    rows: Tensor,
    labels: Tensor,
    shard: VocabShard,
    inverse_temperature: float,
    saved: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    out: Tensor,
    scratch: Scratch,
) -> None:
    """Fill ``out [r, V/TP]`` (may be ``rows`` itself) with the gradient of the logits.

    Args:
        saved: (m, log Z, H), each [r].
        grads: (dL/dlog_probs, dL/dentropy or None), each [r].  A row where both are zero gets an exactly zero gradient
            whatever its logits hold, so that a padding row of NaN cannot reach the weights.
    """
    out[:, shard.num_columns :] = 0
    if shard.num_columns == 0:
        return
    max_logit, log_sum, entropy = saved
    g, h = grads
    is_active = g != 0 if h is None else (g != 0) | (h != 0)
    x, out = rows[:, : shard.num_columns], out[:, : shard.num_columns]
    a, e = scratch.of(len(x))
    _exponents(x, max_logit, inverse_temperature, a)
    torch.exp(a, out=e)
    scale = torch.exp(-log_sum) * inverse_temperature  # 1 / (Z T)
    if h is None:
        e.mul_((-g * scale)[:, None])
    else:
        a.mul_((-h * scale)[:, None]).add_((-(g + h * (entropy - log_sum)) * scale)[:, None])
        e.mul_(a)
    column, is_local = shard.local_columns(labels)
    e.scatter_add_(1, column[:, None], torch.where(is_local, g * inverse_temperature, 0.0)[:, None])
    _zero_inactive(e, is_active)
    out.copy_(e)


def _zero_inactive(gradient: Tensor, is_active: Tensor) -> None:
    if gradient.device.type != "cpu":
        gradient.masked_fill_(~is_active[:, None], 0.0)  # asking which rows would synchronise with the host
    elif not bool(is_active.all()):
        gradient[~is_active] = 0.0
