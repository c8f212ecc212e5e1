"""Triton forms of ``row_blocks.write_partials`` and ``row_blocks.write_gradient``.

Statistics: one program a row walks over its columns once and keeps (m, Z, U, Q) in registers, rescaled whenever a
larger maximum appears.  Gradient: one program a row and tile of columns; every element is read, replaced and written
once, so it may run in place.  A row without upstream gradient is written as zeros and never read.

Two details hold everywhere.  NaN must come out as NaN: Triton's maximum drops it, so no result is clamped with it; the
sum of exponentials carries it.  Offsets of a row are 64-bit: 8192 rows of 262144 columns exceed 2^31.

The kernels are not autotuned.  Tuning would run an in-place kernel several times on live data.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rest.ops.row_statistics import FLOOR, GradientRule
from megatron_rest.ops.sharding import VocabShard

__all__ = ["gradient_kernel", "statistics_kernel", "write_gradient", "write_partials"]

_FLOOR = tl.constexpr(FLOOR)
_MAX_TILE = 4096
_NUM_WARPS = 8


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [n, >= num_columns]
    labels_ptr,  # int64 [n], global ids
    out_ptr,  # fp32 [4 or 5, n]: m, Z, U, t and Q
    row_stride,
    out_stride,
    start,  # global id of the first column
    num_columns,
    inverse_temperature,
    WITH_COLLISION: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    m = -1.0e30
    z = 0.0
    u = 0.0
    q = 0.0
    for begin in range(0, num_columns, TILE):
        column = begin + tl.arange(0, TILE)
        x = tl.load(logits_ptr + column, mask=column < num_columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(m, tl.max(x, 0))
        shift = (m - larger) * inverse_temperature
        scale = tl.exp(shift)
        a = (x - larger) * inverse_temperature
        e = tl.exp(a)
        u = scale * (u + shift * z) + tl.sum(tl.where(e > 0, a * e, 0.0), 0)
        z = scale * z + tl.sum(e, 0)
        if WITH_COLLISION:
            q = scale * scale * q + tl.sum(e * e, 0)
        m = larger
    local = tl.load(labels_ptr + row) - start
    is_local = (local >= 0) & (local < num_columns)
    t = tl.load(logits_ptr + tl.where(is_local, local, 0)).to(tl.float32)
    out_ptr += row
    tl.store(out_ptr, m)
    tl.store(out_ptr + out_stride, z)
    tl.store(out_ptr + 2 * out_stride, u)
    tl.store(out_ptr + 3 * out_stride, tl.where(is_local, t, 0.0))
    if WITH_COLLISION:
        tl.store(out_ptr + 4 * out_stride, q)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [n, local_size]
    out_ptr,  # [n, local_size], may be the logits
    labels_ptr,  # int64 [n], global ids
    max_logit_ptr,  # fp32 [n] and so on: row_statistics.GradientRule
    slope_ptr,
    intercept_ptr,
    at_label_ptr,
    is_active_ptr,  # int8 [n]
    row_stride,
    out_row_stride,
    start,
    num_columns,
    local_size,
    inverse_temperature,
    HAS_SLOPE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_active = tl.load(is_active_ptr + row) != 0
    is_read = (column < num_columns) & is_active
    x = tl.load(logits_ptr + row * row_stride + column, mask=is_read, other=float("-inf")).to(tl.float32)
    a = (x - tl.load(max_logit_ptr + row)) * inverse_temperature
    e = tl.exp(a)
    factor = tl.load(intercept_ptr + row)
    if HAS_SLOPE:  # a is -inf where e is 0: keep it out of the product
        factor = tl.load(slope_ptr + row) * tl.where(x == float("-inf"), 0.0, a) + factor
    local = tl.load(labels_ptr + row) - start
    gradient = e * factor + tl.where(column == local, tl.load(at_label_ptr + row), 0.0)
    gradient = tl.where(is_read, gradient, 0.0)
    tl.store(out_ptr + row * out_row_stride + column, gradient.to(out_ptr.dtype.element_ty), mask=column < local_size)


def write_partials(logits: Tensor, labels: Tensor, shard: VocabShard, inverse_temperature: float, out: Tensor) -> None:
    """Fill ``out [K, n]`` (fp32) with (m, Z, U, t), and Q where K is 5, of ``logits [n, V/TP]``, unit column stride."""
    if shard.num_columns == 0:
        out.zero_()
        out[0] = _FLOOR.value
        return
    statistics_kernel[(len(logits),)](
        logits,
        labels.long().contiguous(),
        out,
        logits.stride(0),
        out.stride(0),
        shard.start,
        shard.num_columns,
        inverse_temperature,
        WITH_COLLISION=len(out) == 5,
        TILE=_tile(shard.num_columns),
        num_warps=_NUM_WARPS,
    )


def write_gradient(
    logits: Tensor, labels: Tensor, shard: VocabShard, inverse_temperature: float, rule: GradientRule, out: Tensor
) -> None:
    """Fill ``out [n, V/TP]``, which may be ``logits`` itself, with the gradient of the logits."""
    tile = _tile(shard.local_size)
    has_slope = rule.slope is not None
    gradient_kernel[(len(logits), triton.cdiv(shard.local_size, tile))](
        logits,
        out,
        labels.long().contiguous(),
        rule.max_logit,
        rule.slope if has_slope else rule.intercept,
        rule.intercept,
        rule.at_label,
        rule.is_active.to(torch.int8),
        logits.stride(0),
        out.stride(0),
        shard.start,
        shard.num_columns,
        shard.local_size,
        inverse_temperature,
        HAS_SLOPE=has_slope,
        TILE=tile,
        num_warps=_NUM_WARPS,
    )


def _tile(num_columns: int) -> int:
    return min(_MAX_TILE, triton.next_power_of_2(num_columns))
