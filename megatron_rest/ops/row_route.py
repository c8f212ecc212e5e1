"""Which rows of the hidden states are projected, and how they reach and leave this rank.

Two things decide it.  *Row compaction*: prompt, tool-output and padding rows carry no loss, in tool use most of them,
so only the listed ``active_rows`` are projected.  *Sequence parallelism*: every tensor-parallel rank holds a contiguous
1/TP of the rows and needs all active ones; only these travel, padded to the largest count of a rank.

Labels and masks are replicated in the tensor-parallel group, so every rank knows all counts without communication; and
the list lives on the CPU, where the batch was packed, so nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.ops.sharding import all_gather_rows, reduce_scatter_rows

__all__ = ["RowRoute"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRoute:
    """The way of ``[n, H]`` (or ``[n/TP, H]``) hidden states to ``[A, H]`` projected rows, and of gradients back."""

    num_rows: int  # n, all rows
    num_active: int  # A
    active: Tensor | None  # int64 [A] on the device; None = all rows
    tp_group: dist.ProcessGroup | None
    sequence_parallel: bool  # True only where there is more than one rank
    local_rows: Tensor | None = None  # this rank's active rows, counted within its own shard
    slots: Tensor | None = None  # [A] place of every active row in the gathered [TP * capacity] rows
    capacity: int = 0  # rows that every rank sends

    @classmethod
    def create(
        cls,
        num_rows: int,
        active_rows: Tensor | None,
        *,
        tp_group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        device: torch.device,
    ) -> RowRoute:
        """Plan the way of ``active_rows`` (CPU int64, strictly increasing, of ``num_rows``; None = all).

        Raises:
            ValueError: the list is not such a list, or the rows do not divide among sequence-parallel ranks.
        """
        rank, size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
        sequence_parallel = sequence_parallel and size > 1
        if sequence_parallel and num_rows % size:
            raise ValueError(
                f"sequence_parallel needs a row count divisible by the {size} ranks, got {num_rows}: pad the batch"
            )
        if active_rows is None:
            return cls(
                num_rows=num_rows,
                num_active=num_rows,
                active=None,
                tp_group=tp_group,
                sequence_parallel=sequence_parallel,
                capacity=num_rows // size,
            )
        _check_active_rows(active_rows, num_rows)
        on_device = active_rows.to(device, non_blocking=True)
        if not sequence_parallel:
            return cls(
                num_rows=num_rows,
                num_active=len(active_rows),
                active=on_device,
                tp_group=tp_group,
                sequence_parallel=False,
            )
        per_rank = num_rows // size
        owner = active_rows // per_rank
        counts = torch.bincount(owner, minlength=size)
        first = counts.cumsum(0) - counts  # position in the list of each rank's first active row
        capacity = int(counts.max())
        slots = owner * capacity + torch.arange(len(active_rows)) - first[owner]
        return cls(
            num_rows=num_rows,
            num_active=len(active_rows),
            active=on_device,
            tp_group=tp_group,
            sequence_parallel=True,
            local_rows=(active_rows[owner == rank] - rank * per_rank).to(device, non_blocking=True),
            slots=slots.to(device, non_blocking=True),
            capacity=capacity,
        )

    @property
    def size(self) -> int:
        return 1 if self.tp_group is None else dist.get_world_size(self.tp_group)

    def gather(self, hidden: Tensor) -> Tensor:
        """Rows to project ``[A, H]``.  Sequence parallel: one all-gather of ``[capacity, H]`` a rank."""
        if not self.sequence_parallel:
            return hidden if self.active is None else hidden.index_select(0, self.active)
        if self.num_active == 0:
            return hidden[:0]
        send = hidden
        if self.local_rows is not None:
            send = hidden.new_zeros(self.capacity, hidden.shape[1])
            send[: len(self.local_rows)] = hidden.index_select(0, self.local_rows)
        gathered = hidden.new_empty(self.size * self.capacity, hidden.shape[1])
        all_gather_rows(gathered, send.contiguous(), self.tp_group)
        return gathered if self.slots is None else gathered.index_select(0, self.slots)

    def give_back(self, grad_rows: Tensor, like: Tensor) -> Tensor:
        """Gradient of the hidden states, in shape and dtype of ``like``, from this rank's partial gradient ``[A, H]``.

        Partial, because each rank sees its own columns of the vocabulary only: summed over the group by one all-reduce,
        or by one reduce-scatter where the sequence is split, in the dtype of ``grad_rows``; rounded after the sum.
        """
        if self.num_active == 0:
            return torch.zeros_like(like)
        if not self.sequence_parallel:
            if self.size > 1:
                dist.all_reduce(grad_rows, group=self.tp_group)
            return grad_rows.to(like.dtype) if self.active is None else _place(grad_rows, self.active, like)
        send = grad_rows
        if self.slots is not None:
            send = grad_rows.new_zeros(self.size * self.capacity, grad_rows.shape[1])
            send.index_copy_(0, self.slots, grad_rows)
        mine = grad_rows.new_empty(self.capacity, grad_rows.shape[1])
        reduce_scatter_rows(mine, send, self.tp_group)
        if self.local_rows is None:
            return mine.to(like.dtype)
        return _place(mine[: len(self.local_rows)], self.local_rows, like)

    def take(self, values: Tensor) -> Tensor:
        """``[n] -> [A]``"""
        return values if self.active is None else values.index_select(0, self.active)

    def spread(self, values: Tensor) -> Tensor:
        """``[A] -> [n]``, zero on rows that are not projected."""
        return values if self.active is None else values.new_zeros(self.num_rows).index_copy_(0, self.active, values)


def _place(rows: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_copy_(0, index, rows.to(like.dtype))


def _check_active_rows(active_rows: Tensor, num_rows: int) -> None:
    if active_rows.dim() != 1 or active_rows.dtype != torch.int64 or active_rows.device.type != "cpu":
        raise ValueError(
            f"active_rows must be a one-dimensional int64 tensor on the CPU, got {list(active_rows.shape)} "
            f"{active_rows.dtype} on {active_rows.device}: build it from the loss mask when the batch is packed"
        )
    if len(active_rows) == 0:
        return
    is_ordered = bool((active_rows[1:] > active_rows[:-1]).all())
    if not is_ordered or int(active_rows[0]) < 0 or int(active_rows[-1]) >= num_rows:
        raise ValueError(
            f"active_rows must be strictly increasing row numbers in [0, {num_rows}) of the flattened labels"
        )
