"""Train samples -> packed microbatches.  Labels are shifted here, once.

Every rank of a data-parallel replica calls this with the same samples and gets the same microbatches; replicas get
disjoint ones, equally many (an empty microbatch takes part in every collective).  Denominators (:class:`BatchTotals`)
are computed over all samples before anything is split, so how the work is packed or dealt out changes neither loss
nor gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_rest.types import BatchTotals, MicroBatch, TokenRegion, TrainBatch, TrainSample

__all__ = ["batch_totals", "make_microbatch", "make_train_batch", "pack"]


def make_train_batch(
    samples: Sequence[TrainSample],
    *,
    max_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    alignment: int = 1,
    num_microbatches_multiple: int = 1,
    min_microbatches: int = 1,
) -> TrainBatch:
    """Pack ``samples`` of one optimiser step and return the share of ``dp_rank``.

    Args:
        samples: of ALL data-parallel ranks, in the same order everywhere.
        max_tokens: most tokens of one microbatch; a longer sample raises ``ValueError`` (nothing is cut).
        alignment: microbatch lengths are padded to a multiple (TP size under sequence parallelism).
        num_microbatches_multiple: pipeline size under interleaved schedules, else 1.
        min_microbatches: microbatches that every replica should get if there are samples enough: a pipeline idles
            less with
            several small ones than with one large one.
    """
    if not samples:
        raise ValueError("no samples to train on")
    lengths = [len(s.token_ids) - 1 for s in samples]
    wanted = max(min_microbatches, 1) * dp_size
    bins = pack(lengths, min(max_tokens, max(-(-sum(lengths) // wanted), max(lengths))))
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


def make_microbatch(samples: Sequence[TrainSample], *, alignment: int = 1) -> MicroBatch:
    """Pack ``samples`` into one microbatch; a last, masked sequence fills up to ``alignment``."""
    lengths = [len(s.token_ids) - 1 for s in samples]
    total = sum(lengths)
    padding = -total % alignment if total else max(alignment, 1)
    size = total + padding
    columns = {
        "token_ids": np.zeros(size, np.int64),
        "labels": np.zeros(size, np.int64),
        "position_ids": np.zeros(size, np.int64),
        "loss_mask": np.zeros(size, bool),
        "region_ids": np.full(size, int(TokenRegion.CONTEXT), np.int64),
        "sequence_ids": np.full(size, -1, np.int64),
        "sequence_lengths": np.ones(size, np.float32),
        "advantages": np.zeros(size, np.float32),
        "rollout_log_probs": np.zeros(size, np.float32),
    }
    start = 0
    for sample, n in zip(samples, lengths, strict=True):
        here = slice(start, start + n)
        columns["token_ids"][here] = sample.token_ids[:-1]
        columns["labels"][here] = sample.token_ids[1:]
        columns["position_ids"][here] = np.arange(n)
        columns["loss_mask"][here] = sample.loss_mask[1:]
        columns["region_ids"][here] = sample.region_ids[1:]
        columns["sequence_ids"][here] = sample.sequence_id
        columns["sequence_lengths"][here] = max(int(sample.loss_mask.sum()), 1)
        columns["advantages"][here] = sample.advantage
        columns["rollout_log_probs"][here] = sample.rollout_log_probs[1:]
        start += n
    columns["position_ids"][start:] = np.arange(padding)
    bounds = np.cumsum([0, *lengths, *([padding] if padding else [])])
    return MicroBatch(
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)), **{k: torch.from_numpy(v) for k, v in columns.items()}
    )
