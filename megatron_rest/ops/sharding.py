"""Which columns of the vocabulary this rank holds, and the one collective that joins the ranks.

Tensor-parallel rank r of TP holds columns ``[r * V/TP, (r + 1) * V/TP)`` of the padded vocabulary.  Columns at or
beyond the true ``vocab_size`` are padding: they are never read, and their gradient is zero.  Everything else in ``ops``
asks a :class:`VocabShard` instead of looking up ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["VocabShard", "all_gather_rows", "reduce_scatter_rows"]


def all_gather_rows(out: Tensor, local: Tensor, group: dist.ProcessGroup | None) -> None:
    """``out [TP * n, ...]`` = the ranks' ``local [n, ...]`` in rank order (torch 2.13 renamed the function)."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, local, group=group)


def reduce_scatter_rows(out: Tensor, partial: Tensor, group: dist.ProcessGroup | None) -> None:
    """``out [n, ...]`` = this rank's part of the sum over ranks of ``partial [TP * n, ...]``."""
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(out, partial, group=group)


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabShard:
    """This rank holds ids ``[start, start + num_columns)``; the rest of its ``local_size`` columns are padding.

    Rank 1 of 2 with 6 columns a rank and 10 true ids: ``start=6, local_size=6, num_columns=4, vocab_size=10``.
    """

    start: int  # first global id of this rank
    local_size: int  # columns of the local tensor, padding included
    num_columns: int  # columns that are real ids; 0 when the whole shard is padding
    vocab_size: int  # true size of the whole vocabulary
    tp_group: dist.ProcessGroup | None = None  # None = unsharded

    @classmethod
    def create(cls, local_size: int, *, tp_group: dist.ProcessGroup | None, vocab_size: int | None) -> VocabShard:
        """Describe this rank's shard of ``local_size`` columns.

        Raises:
            ValueError: ``vocab_size`` is not in ``1 .. TP * local_size``.
        """
        rank, size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
        padded = local_size * size
        if vocab_size is None:
            vocab_size = padded
        if not 0 < vocab_size <= padded:
            raise ValueError(
                f"vocab_size must be in 1..{padded} ({size} tensor-parallel ranks x {local_size} columns), got "
                f"{vocab_size}: pass the true vocabulary size, and the tp_group that splits the logits or the weight"
            )
        start = rank * local_size
        num_columns = min(max(vocab_size - start, 0), local_size)
        return cls(
            start=start, local_size=local_size, num_columns=num_columns, vocab_size=vocab_size, tp_group=tp_group
        )

    @property
    def size(self) -> int:
        """Number of tensor-parallel ranks."""
        return 1 if self.tp_group is None else dist.get_world_size(self.tp_group)

    @property
    def rank(self) -> int:
        return 0 if self.tp_group is None else dist.get_rank(self.tp_group)

    def local_columns(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each global label and whether this rank holds it; labels held elsewhere point at column 0.

        A label of another rank must never match one of this rank's padded columns, hence ``num_columns``.
        """
        column = labels.long() - self.start
        is_local = (column >= 0) & (column < self.num_columns)
        return torch.where(is_local, column, 0), is_local

    def check_labels(self, labels: Tensor) -> None:
        """Fail on a label outside ``[0, vocab_size)``: ValueError on CPU, on CUDA an assertion without a sync."""
        if labels.numel() == 0:
            return
        in_range = (labels >= 0) & (labels < self.vocab_size)
        message = (
            f"labels must be global vocabulary ids in [0, {self.vocab_size}); give positions without a label (padding, "
            "ignore_index) any valid id, such as 0, and leave them out of the loss by its mask"
        )
        if labels.device.type != "cpu":
            torch._assert_async(in_range.all(), message)
        elif not bool(in_range.all()):
            wrong = labels[~in_range]
            raise ValueError(f"{message}; got {wrong.numel()} labels outside, such as {int(wrong[0])}")

    def all_gather(self, partials: Tensor) -> Tensor:
        """``[K, n]`` of this rank -> ``[TP, K, n]`` in rank order.  The one collective of these operators."""
        if self.size == 1 or partials.numel() == 0:  # n is the same on every rank: all skip together
            return partials[None]
        gathered = partials.new_empty(self.size * partials.shape[0], partials.shape[1])
        all_gather_rows(gathered, partials.contiguous(), self.tp_group)
        return gathered.view(self.size, *partials.shape)
