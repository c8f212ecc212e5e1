"""The passes over a block of logits: statistics of its rows, and their gradient written in its place.

``row_statistics`` has the formulas.  Exponentials are taken as 2^(a log2 e).  On CPU torch hands ``exp`` to MKL, whose
speed depends on who made the processor (0.8 ns an element on an AMD EPYC), and ``exp2`` to vector code that does not
(0.3 ns); the factor log2 e joins 1/T, and its rounding moves an exponential by 1e-6 at most where e^a counts at all.

The work goes in tiles, a few rows of a part of the columns, small enough that every pass but the first hits the cache,
large enough that calling an operator (about 2 us) is small beside it; passes write into two scratch tiles.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from megatron_rest.ops.row_statistics import FLOOR, GradientRule, merge_partials
from megatron_rest.ops.sharding import VocabShard

__all__ = ["Scratch", "write_gradient", "write_partials"]

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)

# Elements of a scratch tile, and its columns.  On CPU 1 MiB of fp32: measured, half of it pays more for operator calls
# than it gains in the L2 cache, and twice as much gains 5 % here but needs a large L3 cache.  On a GPU the eager passes
# only need enough work to fill the device.
_CPU_TILE_ELEMENTS = 1 << 18
_GPU_TILE_ELEMENTS = 1 << 24
_TILE_COLUMNS = 1 << 15


def _column_tiles(num_columns: int) -> list[slice]:
    """Equal parts of the columns, none wider than a tile; no part where there are no columns."""
    if num_columns == 0:
        return []
    width = -(-num_columns // -(-num_columns // _TILE_COLUMNS))
    return [slice(begin, min(begin + width, num_columns)) for begin in range(0, num_columns, width)]


def _row_blocks(num_rows: int, tiles: list[slice], device: torch.device) -> Iterator[slice]:
    """Slices of consecutive rows whose widest tile fills the scratch."""
    elements = _CPU_TILE_ELEMENTS if device.type == "cpu" else _GPU_TILE_ELEMENTS
    step = max(1, elements // tiles[0].stop)
    for begin in range(0, num_rows, step):
        yield slice(begin, min(begin + step, num_rows))


def _kernels_for(logits: Tensor) -> ModuleType | None:
    """The Triton form of the row passes where it applies: CUDA, fp32 arithmetic, unit column stride."""
    if logits.device.type != "cuda" or logits.dtype == torch.float64 or logits.stride(1) != 1 or len(logits) == 0:
        return None
    return _import_kernels()


@functools.cache
def _import_kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from megatron_rest.ops import triton

    return triton


class Scratch:
    """The two buffers that a tile's passes write into, exponents and exponentials; made on first use."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._buffers = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]
        self._views = self._buffers

    def of(self, tile: Tensor) -> list[Tensor]:
        """The two as contiguous buffers in the shape of ``tile``."""
        if self._views[0].shape != tile.shape:
            if self._buffers[0].numel() < tile.numel():
                self._buffers = [buffer.new_empty(tile.numel()) for buffer in self._buffers]
            self._views = [buffer[: tile.numel()].view(tile.shape) for buffer in self._buffers]
        return self._views


def write_partials(
    logits: Tensor, labels: Tensor, shard: VocabShard, inverse_temperature: float, out: Tensor, scratch: Scratch
) -> bool:
    """Fill ``out [K, n]`` with (m, Z, U, t), and Q where K is 5, of ``logits [n, V/TP]`` of any floating dtype.

    Returns whether every column was found to be above -inf: ``write_gradient`` then needs no guard against it.  Only
    the CPU looks; elsewhere the answer is False, because asking would synchronise with the host.
    """
    kernels = _kernels_for(logits)
    if kernels is not None:
        kernels.write_partials(logits, labels, shard, inverse_temperature, out)
        return False
    on_cpu = logits.device.type == "cpu"
    tiles = _column_tiles(shard.num_columns)
    parts = torch.zeros(max(1, len(tiles)), *out.shape, dtype=out.dtype, device=out.device)
    parts[:, 0] = FLOOR
    work = [
        (logits[at, columns], part[:, at])
        for part, columns in zip(parts, tiles, strict=False)  # a shard of padding has one part and no tile
        for at in _row_blocks(len(logits), tiles, logits.device)
    ]
    for x, part in work:
        _tile_partials(x, inverse_temperature, part, scratch, guard=not on_cpu)
    is_finite = on_cpu and not bool(parts[:, 2].isnan().any())  # -inf * e^-inf shows in U
    if on_cpu and not is_finite:
        for x, part in work:
            if bool(part[2].isnan().any()):
                _tile_partials(x, inverse_temperature, part, scratch, guard=True)
    out.copy_(merge_partials(parts, inverse_temperature))
    if tiles:
        column, is_local = shard.local_columns(labels)
        out[3] = torch.where(is_local, _pick(logits, column).to(out.dtype), 0.0)
    return is_finite


def _tile_partials(x: Tensor, inverse_temperature: float, out: Tensor, scratch: Scratch, *, guard: bool) -> None:
    """Fill the rows of ``out [K, r]`` but the label's from one tile ``[r, c]`` of the logits."""
    a, e = scratch.of(x)
    if x.dtype != a.dtype:
        x = a.copy_(x)  # reducing the widened copy is much faster than reducing bf16 on CPU
    m = torch.amax(x, -1).clamp_(min=FLOOR)
    _binary_exponents(x, m, inverse_temperature, a, guard=guard)
    torch.exp2(a, out=e)
    out[0] = m
    torch.sum(e, -1, out=out[1])
    torch.sum(a.mul_(e), -1, out=out[2]).mul_(_LN_2)
    if len(out) == 5:
        out[4] = e.square_().sum(-1)


def _binary_exponents(
    x: Tensor, max_logit: Tensor, inverse_temperature: float, out: Tensor, *, guard: bool = True
) -> None:
    """``out = (x - m) / T log2 e``; guarded, -inf becomes a finite floor: -inf * 2^-inf is NaN where 0 is meant."""
    if x.dtype == out.dtype:
        torch.sub(x, max_logit[:, None], out=out)
    else:  # widening first is several times faster than mixed-dtype arithmetic on CPU
        out.copy_(x).sub_(max_logit[:, None])
    out.mul_(inverse_temperature * _LOG2_E)
    if guard:
        out.clamp_(min=FLOOR)


def _pick(logits: Tensor, column: Tensor) -> Tensor:
    return logits.gather(1, column[:, None])[:, 0]


def write_gradient(
    logits: Tensor,
    labels: Tensor,
    shard: VocabShard,
    inverse_temperature: float,
    rule: GradientRule,
    out: Tensor,
    scratch: Scratch,
) -> None:
    """Fill ``out [n, V/TP]``, which may be ``logits`` itself, with the gradient of the logits."""
    kernels = _kernels_for(logits)
    if kernels is not None and out.stride(1) == 1:
        kernels.write_gradient(logits, labels, shard, inverse_temperature, rule, out)
        return
    out[:, shard.num_columns :] = 0
    if shard.num_columns == 0:
        return
    column, is_local = shard.local_columns(labels)
    at_label = _gradient_at_label(logits, column, inverse_temperature, rule)  # before ``out`` overwrites the logits
    tiles = _column_tiles(shard.num_columns)
    may_skip = logits.device.type == "cpu" and not bool(
        rule.is_active.all()
    )  # elsewhere asking would wait for the device
    for at in _row_blocks(len(logits), tiles, logits.device):
        if may_skip and not bool(rule.is_active[at].any()):
            out[at] = 0
            continue
        rows = rule[at]
        for columns in tiles:
            _tile_gradient(logits[at, columns], inverse_temperature, rows, out[at, columns], scratch)
    # index_put_, because scatter_ copies the whole matrix on CPU; a label held elsewhere keeps column 0 as it is
    row = torch.arange(len(out), device=out.device)
    out.index_put_((row, column), torch.where(is_local, at_label.to(out.dtype), _pick(out, column)))
    _zero_inactive(out, rule.is_active)


def _tile_gradient(x: Tensor, inverse_temperature: float, rule: GradientRule, out: Tensor, scratch: Scratch) -> None:
    a, e = scratch.of(x)
    _binary_exponents(x, rule.max_logit, inverse_temperature, a, guard=not rule.is_finite)
    torch.exp2(a, out=e)
    if rule.slope is None:
        a = rule.intercept[:, None]
    else:
        a.mul_((rule.slope * _LN_2)[:, None]).add_(rule.intercept[:, None])
    if out.dtype == e.dtype:
        torch.mul(e, a, out=out)
    else:
        out.copy_(e.mul_(a))


def _gradient_at_label(logits: Tensor, column: Tensor, inverse_temperature: float, rule: GradientRule) -> Tensor:
    """The label's own element ``[n]``, summed before it is rounded to the storage dtype."""
    a = torch.empty_like(rule.intercept)[:, None]
    _binary_exponents(_pick(logits, column)[:, None], rule.max_logit, inverse_temperature, a)
    a = a[:, 0]
    factor = rule.intercept if rule.slope is None else a * (rule.slope * _LN_2) + rule.intercept
    return rule.at_label + torch.exp2(a) * factor


def _zero_inactive(gradient: Tensor, is_active: Tensor) -> None:
    if gradient.device.type != "cpu":
        gradient.masked_fill_(~is_active[:, None], 0.0)
    elif not bool(is_active.all()):
        gradient[~is_active] = 0.0
