"""The three matrix products of a policy head on one block of rows, with fp32 accumulators that are never rounded down.

Logits that pass through bf16 storage are off by up to 0.07 nats, against a clip range of 0.2; fp32 logits from the same
bf16 operands are off by 3e-6.  So the logits block is fp32 whatever the operands are.  Gradient operands may be bf16
(their error, 2e-3 relative, is that of any bf16 backward pass), their sums may not.

On CUDA bf16 operands go to the tensor cores with ``out_dtype=float32`` (torch 2.8).  Where that is missing, on CPU and
on older releases, the weight is widened tile by tile: one more pass over it a block, but no full copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["accumulate_weight_gradient", "default_block_size", "hidden_gradient", "new_block", "project"]

# Rows of the weight that are widened at once: 16 MiB of fp32 at hidden size 1024.
_WIDEN_ROWS = 4096

# Elements of the fp32 logits block, 64 MiB on CPU.  Larger blocks cost memory; smaller ones read and write the weight
# gradient more often than its products are worth (on a GPU, 17 % of their time at 2048 rows, 9 % at 4096).
_CPU_BLOCK_ELEMENTS = 1 << 24
_GPU_BLOCK_ELEMENTS = 1 << 27
_MIN_BLOCK_ROWS = 256

# Rows of a block that lie a multiple of this apart (2 KiB) fall on few sets of a cache, and of the translation buffer:
# at 32768 columns products with such a block are 10 % slower.  Those rows get some elements between them.
_BAD_ROW_STRIDE = 512
_ROW_GAP = 64


def default_block_size(num_columns: int, device: torch.device) -> int:
    """Rows of a logits block of ``num_columns`` local columns."""
    elements = _CPU_BLOCK_ELEMENTS if device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    return max(_MIN_BLOCK_ROWS, elements // max(1, num_columns))


def new_block(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised ``[num_rows, num_columns]`` for blocks of logits; columns are contiguous, rows may not be."""
    gap = 0 if num_columns % _BAD_ROW_STRIDE else _ROW_GAP
    return torch.empty(num_rows, num_columns + gap, dtype=dtype, device=device)[:, :num_columns]


def _has_wide_products(device: torch.device) -> bool:
    return device.type == "cuda" and "dtype_out" in torch.ops.aten.mm.overloads()


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for begin in range(0, len(weight), _WIDEN_ROWS):
        tile = slice(begin, min(begin + _WIDEN_ROWS, len(weight)))
        yield tile, weight[tile].to(dtype)


def project(x: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Logits ``x [r, H] @ weight [V/TP, H]^T`` in the dtype of ``buffer [>= r, V/TP]``, which holds the result."""
    out = buffer[: len(x)]
    if weight.dtype == out.dtype:
        return torch.mm(x, weight.t(), out=out)
    if _has_wide_products(x.device):
        return torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    wide = x.to(out.dtype)
    for columns, tile in _tiles(weight, out.dtype):
        torch.mm(wide, tile.t(), out=out[:, columns])
    return out


def hidden_gradient(grad_logits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad_logits [r, V/TP] @ weight [V/TP, H]`` in ``dtype``, summed in the dtype of the gradient."""
    if weight.dtype == grad_logits.dtype:
        return torch.mm(grad_logits, weight)
    if _has_wide_products(weight.device):
        narrow = grad_logits.to(weight.dtype)
        return torch.mm(narrow, weight) if dtype == weight.dtype else torch.mm(narrow, weight, out_dtype=dtype)
    total = grad_logits.new_zeros(len(grad_logits), weight.shape[1])
    for columns, tile in _tiles(weight, grad_logits.dtype):
        total.addmm_(grad_logits[:, columns], tile)
    return total.to(dtype)


def accumulate_weight_gradient(grad_logits: Tensor, x: Tensor, total: Tensor) -> None:
    """``total [V/TP, H] += grad_logits^T @ x`` in the dtype of ``total``, which is fp32 (float64 for float64)."""
    if x.dtype != total.dtype and _has_wide_products(x.device):
        total.add_(torch.mm(grad_logits.to(x.dtype).t(), x, out_dtype=total.dtype))
    else:
        total.addmm_(grad_logits.t(), x.to(total.dtype))
