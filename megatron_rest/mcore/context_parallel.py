"""Context parallelism: which tokens of a packed microbatch lie on which rank.

Megatron's (and Transformer Engine's) zigzag: every sequence is cut into ``2 CP`` equal chunks, and rank ``r`` holds the
chunks ``r`` and ``2 CP - 1 - r``, so that all ranks have the same work under a causal mask.

    sequence of 8 tokens, CP 2      0 1 | 2 3 | 4 5 | 6 7
    rank 0                          0 1               6 7
    rank 1                                2 3   4 5

Microbatches are whole on the host of every rank; :func:`shard` is the one place that cuts them, :func:`gather` the one
place that puts values back into sequence order.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.types import MicroBatch

__all__ = ["gather", "shard", "zigzag_order"]

_WHOLE = ("cu_seqlens", "parents", "active_rows")  # speak of sequences, not of rows, or are made anew


def zigzag_order(lengths: Tensor, cp_size: int) -> Tensor:
    """What every rank holds of sequences packed one after the other, in its own order: positions, int64
    ``[CP, T / CP]``.

    ``lengths`` int ``[S]``, of the whole sequences.  Raises ValueError if one is not a multiple of ``2 CP``.
    """
    if cp_size > 1 and (lengths % (2 * cp_size)).any():
        raise ValueError(
            f"sequences of {lengths.tolist()} tokens cannot be dealt out to {cp_size} context-parallel ranks: pad each "
            f"to a multiple of {2 * cp_size} (data.alignment)"
        )
    lengths = lengths.long()
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    positions = torch.arange(len(starts), device=lengths.device)
    chunk = (positions - starts) * 2 * cp_size // lengths.repeat_interleave(lengths)
    owner = torch.minimum(chunk, 2 * cp_size - 1 - chunk)
    return owner.argsort(stable=True).view(cp_size, -1)


def shard(microbatch: MicroBatch, *, cp_rank: int, cp_size: int) -> MicroBatch:
    """This rank's tokens of ``microbatch``; ``cu_seqlens`` still speaks of the whole sequences.

    On the CPU: the rows with loss are listed anew there.
    """
    if cp_size == 1:
        return microbatch
    mine = zigzag_order(microbatch.cu_seqlens.diff(), cp_size)[cp_rank]
    tokens: dict[str, Any] = {
        f.name: value[mine]
        for f in fields(microbatch)
        if isinstance(value := getattr(microbatch, f.name), Tensor) and f.name not in _WHOLE
    }
    # The ranks' counts are added up.
    left_out = microbatch.left_out_tokens if cp_rank == 0 else 0
    return replace(microbatch, cp_size=cp_size, left_out_tokens=left_out, **tokens)


def gather(local: Tensor, lengths: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[..., T / CP]`` of every rank -> ``[..., T]`` in sequence order, on every rank.  No gradient.

    ``lengths`` as in :func:`zigzag_order`.  Collective: one all-gather over ``group``.
    """
    if group.size() == 1:
        return local
    parts = local.new_empty(group.size(), *local.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), local.contiguous(), group=group)  # a view
    place = zigzag_order(lengths, group.size()).flatten().argsort().to(local.device)
    return parts.movedim(0, -2).flatten(-2)[..., place]
