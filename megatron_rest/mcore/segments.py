"""Packed segments of which some continue others, as Megatron's layers are told of them.

To Megatron the microbatch is one sequence whose rotary table has a row for every token: :func:`follow_positions` takes
the rows of the table by the tokens' places in their whole sequences.  Core attention reads the rest
(``attention.py``).  Where context-parallel ranks share the rows, Megatron cuts that table segment by segment as it cuts
packed sequences.

``docs/shared_prompts.md`` says why this is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rest.types import MicroBatch

__all__ = ["SegmentParams", "ancestors", "follow_positions", "segment_params"]


@dataclass
class SegmentParams(PackedSeqParams):
    """``PackedSeqParams`` with the structure; made once a microbatch and pass, so that no layer does host work."""

    bounds: tuple[int, ...] = ()  # [S + 1]
    parents: tuple[int, ...] = ()  # [S], -1: continues nothing
    positions: Tensor | None = None  # int64 [T * CP]: place in the whole sequence


def segment_params(microbatch: MicroBatch) -> SegmentParams:
    """Of a microbatch with ``parents``."""
    assert microbatch.parents is not None, "plain packed sequences have Megatron's own PackedSeqParams"
    bounds, parents = microbatch.bounds, tuple(microbatch.parents.tolist())
    starts: list[int] = []
    for parent in parents:
        starts.append(0 if parent < 0 else starts[parent] + bounds[parent + 1] - bounds[parent])
    places = [torch.arange(start, start + b - a) for start, (a, b) in zip(starts, pairwise(bounds), strict=True)]
    positions = torch.cat(places)
    device = microbatch.cu_seqlens.device
    whole = torch.tensor([0, bounds[-1]], dtype=torch.int32).to(device, non_blocking=True)
    cu_seqlens = microbatch.cu_seqlens if microbatch.cp_size > 1 else whole
    longest = int(positions.max()) + 1
    return SegmentParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
        parents=parents,
        positions=positions.to(device, non_blocking=True),
    )


def ancestors(parents: tuple[int, ...], segment: int) -> list[int]:
    """The segments that ``segment`` continues, the first one first."""
    found: list[int] = []
    parent = parents[segment] if parents else -1
    while parent >= 0:
        found.insert(0, parent)
        parent = parents[parent]
    return found


def follow_positions(model: Any) -> None:
    """Let ``model`` take its rotary table by ``packed_seq_params.positions`` wherever a pass has them."""
    positions: list[Tensor | None] = [None]

    def remember(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions[0] = getattr(kwargs.get("packed_seq_params"), "positions", None)

    def take(_: Any, args: Any, table: Tensor) -> Tensor:
        return table if positions[0] is None else table.index_select(0, positions[0])

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.rotary_pos_emb.register_forward_hook(take)
