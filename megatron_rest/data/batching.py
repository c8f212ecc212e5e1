"""Train samples -> packed microbatches.  Labels are shifted here, once.

Every rank of a data-parallel replica calls this with the same samples and gets the same microbatches; replicas get
disjoint ones, equally many (an empty microbatch takes part in every collective).  Denominators (:class:`BatchTotals`)
are computed over all samples before anything is split, so how the work is packed or dealt out changes neither loss
nor gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_rest.data.alignment import UNALIGNED, PackingAlignment
from megatron_rest.types import BatchTotals, MicroBatch, TokenRegion, TrainBatch, TrainSample

__all__ = ["batch_totals", "make_microbatch", "make_train_batch", "pack"]


def make_train_batch(
    samples: Sequence[TrainSample],
    *,
    max_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    alignment: PackingAlignment = UNALIGNED,
    num_microbatches_multiple: int = 1,
    min_microbatches: int = 1,
) -> TrainBatch:
    """Pack ``samples`` of one optimiser step and return the share of ``dp_rank``.

    Args:
        samples: of ALL data-parallel ranks, in the same order everywhere.
        max_tokens: most tokens of one microbatch, rounded up to ``alignment``; a longer sample raises ``ValueError``
            (nothing is cut).
        alignment: multiples that sequences and microbatches are padded to.
        num_microbatches_multiple: pipeline size under interleaved schedules, else 1.
        min_microbatches: microbatches that every replica should get if there are samples enough: a pipeline idles
            less with
            several small ones than with one large one.
    """
    if not samples:
        raise ValueError("no samples to train on")
    lengths = [_round_up(len(s.token_ids) - 1, alignment.sequence) for s in samples]
    wanted = max(min_microbatches, 1) * dp_size
    limit = _round_up(max_tokens, alignment.sequence)
    bins = pack(lengths, min(limit, max(-(-sum(lengths) // wanted), max(lengths))))
    per_rank = -(-len(bins) // dp_size)
    per_rank = -(-per_rank // num_microbatches_multiple) * num_microbatches_multiple
    # Bins come sorted by size, so dealing them round robin balances the replicas.
    mine = [bins[i] if i < len(bins) else [] for i in range(dp_rank, per_rank * dp_size, dp_size)]
    return TrainBatch(
        microbatches=tuple(make_microbatch([samples[i] for i in b], alignment=alignment) for b in mine),
        totals=batch_totals(samples),
    )


def batch_totals(samples: Sequence[TrainSample]) -> BatchTotals:
    """Denominators over all samples of an optimiser step (weights are mean 1 per sequence, so they sum to the
    tokens).
    """
    counts = [int(s.loss_mask.sum()) for s in samples]
    return BatchTotals(
        num_tokens=float(sum(counts)),
        num_sequences=float(sum(c > 0 for c in counts)),
        weight_sum=float(sum(counts)),
    )


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: indices of ``lengths`` in bins of at most ``max_tokens``, fullest bins first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        if lengths[i] > max_tokens:
            raise ValueError(
                f"sample {i} has {lengths[i]} tokens, more than the {max_tokens} of a microbatch: "
                "raise trainer.max_tokens_per_microbatch or shorten prompts and responses"
            )
        b = next((b for b, free in enumerate(room) if free >= lengths[i]), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[b].append(i)
        room[b] -= lengths[i]
    return [bins[b] for b in sorted(range(len(bins)), key=lambda b: (room[b], b))]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def make_microbatch(samples: Sequence[TrainSample], *, alignment: PackingAlignment = UNALIGNED) -> MicroBatch:
    """Pack ``samples`` into one microbatch.

    Every sequence is padded to ``alignment.sequence``; a last, masked one fills up to ``alignment.total``.
    """
    lengths = [len(s.token_ids) - 1 for s in samples]
    spans = [_round_up(n, alignment.sequence) for n in lengths]
    total = sum(spans)
    padding = -total % alignment.total if total else alignment.total
    bounds = np.cumsum([0, *spans, *([padding] if padding else [])])
    size = total + padding
    columns = {
        "token_ids": np.zeros(size, np.int64),
        "labels": np.zeros(size, np.int64),
        "position_ids": np.arange(size) - np.repeat(bounds[:-1], np.diff(bounds)),
        "loss_mask": np.zeros(size, bool),
        "region_ids": np.full(size, int(TokenRegion.CONTEXT), np.int64),
        "sequence_ids": np.full(size, -1, np.int64),
        "sequence_lengths": np.ones(size, np.float32),
        "advantages": np.zeros(size, np.float32),
        "rollout_log_probs": np.zeros(size, np.float32),
    }
    for sample, n, start in zip(samples, lengths, bounds, strict=False):
        here = slice(start, start + n)
        columns["token_ids"][here] = sample.token_ids[:-1]
        columns["labels"][here] = sample.token_ids[1:]
        columns["loss_mask"][here] = sample.loss_mask[1:]
        columns["region_ids"][here] = sample.region_ids[1:]
        columns["sequence_ids"][here] = sample.sequence_id
        columns["sequence_lengths"][here] = max(int(sample.loss_mask.sum()), 1)
        columns["advantages"][here] = sample.advantage
        columns["rollout_log_probs"][here] = sample.rollout_log_probs[1:]
    tensors: dict[str, Any] = {name: torch.from_numpy(column) for name, column in columns.items()}
    return MicroBatch(cu_seqlens=torch.from_numpy(bounds.astype(np.int32)), **tensors)
