"""Projection with its statistics in the epilogue: logits live in registers, a tile at a time, and never in memory.

One program multiplies a tile of rows with a tile of vocabulary columns, accumulating in fp32, and reduces the tile to
(m, Z, U, t) of every row before it leaves the registers.  ``row_blocks`` folds the tiles as it folds tensor-parallel
ranks.  Optionally the tile is stored as E = e^((x - m_tile) / T) in bf16, a number in [0, 1] with a relative error of
2^-8, which is that of a bf16 gradient anyway; log p can be rebuilt from it.

Checked through Triton's interpreter and by compilation for sm_90.  Not yet called by the operators, which use the
library's matrix product and the row kernels: which of the two is faster needs a GPU to say.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rest.ops.sharding import VocabShard

__all__ = ["NUM_STAGES", "NUM_WARPS", "TILES", "project_partials", "projection_kernel"]

TILES = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
NUM_WARPS = 8
NUM_STAGES = 4


@triton.jit
def projection_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [n, H]
    weight_ptr,  # [>= num_columns, H]
    labels_ptr,  # int64 [n], global ids
    out_ptr,  # fp32 [tiles, 4, n]: m, Z, U, t
    e_ptr,  # bf16 [n, local_size], or anything where STORE_E is false
    num_rows,
    hidden_size,
    x_stride,
    weight_stride,
    e_stride,
    start,  # global id of the first column
    num_columns,
    inverse_temperature,
    STORE_E: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies the bit patterns of bf16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # row tiles run fastest: they share the weight tile
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < num_rows
    is_column = column < num_columns
    x_rows = x_ptr + row.to(tl.int64)[:, None] * x_stride
    weight_rows = weight_ptr + column.to(tl.int64)[None, :] * weight_stride
    logits = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, hidden_size, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        is_k = k < hidden_size
        x = tl.load(x_rows + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
        weight = tl.load(weight_rows + k[:, None], mask=is_column[None, :] & is_k[:, None], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        logits = tl.dot(x, weight, logits, input_precision="ieee")
    local = tl.load(labels_ptr + row, mask=is_row, other=-1) - start
    t = tl.sum(tl.where(column[None, :] == local[:, None], logits, 0.0), 1)
    is_local = (local >= 0) & (local < num_columns)
    logits = tl.where(is_column[None, :], logits, float("-inf"))
    m = tl.max(logits, 1)  # finite: a tile has at least one column; NaN is dropped here and carried by Z
    a = (logits - m[:, None]) * inverse_temperature
    e = tl.exp(a)
    out_ptr += tl.program_id(1).to(tl.int64) * 4 * num_rows + row
    tl.store(out_ptr, m, mask=is_row)
    tl.store(out_ptr + num_rows, tl.sum(e, 1), mask=is_row)
    tl.store(out_ptr + 2 * num_rows, tl.sum(tl.where(e > 0, a * e, 0.0), 1), mask=is_row)
    tl.store(out_ptr + 3 * num_rows, tl.where(is_local, t, 0.0), mask=is_row)
    if STORE_E:
        e_rows = e_ptr + row.to(tl.int64)[:, None] * e_stride + column[None, :]
        tl.store(e_rows, e.to(tl.bfloat16), mask=is_row[:, None] & is_column[None, :])


def project_partials(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: VocabShard,
    inverse_temperature: float,
    exponentials: Tensor | None = None,
    *,
    upcast: bool = False,
) -> Tensor:
    """Partials ``[tiles, 4, n]`` (fp32: m, Z, U, t) of ``x [n, H] @ weight [V/TP, H]^T``, for ``fold_partials``.

    Args:
        x, weight: unit stride along H, bf16, fp16 or fp32 (multiplied in full fp32, without TF32).
        labels: int [n], global ids.
        shard: must hold at least one column (``num_columns >= 1``); padded ones are not read.
        exponentials: bf16 ``[n, V/TP]``, filled with e^((logit - m of its tile) / T); padded columns stay as they are.
        upcast: multiply in fp32, for Triton's interpreter, which is wrong on bf16.

    Raises:
        ValueError: a shard without columns.
    """
    if shard.num_columns == 0:
        raise ValueError("project_partials needs a shard with at least one column that is not padding")
    n, hidden_size = x.shape
    row_tiles, column_tiles = triton.cdiv(n, TILES["BLOCK_M"]), triton.cdiv(shard.num_columns, TILES["BLOCK_N"])
    out = torch.empty(column_tiles, 4, n, dtype=torch.float32, device=x.device)
    if n == 0:
        return out
    projection_kernel[(row_tiles, column_tiles)](
        x,
        weight,
        labels.long().contiguous(),
        out,
        out if exponentials is None else exponentials,
        n,
        hidden_size,
        x.stride(0),
        weight.stride(0),
        0 if exponentials is None else exponentials.stride(0),
        shard.start,
        shard.num_columns,
        inverse_temperature,
        STORE_E=exponentials is not None,
        UPCAST=upcast,
        **TILES,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out
