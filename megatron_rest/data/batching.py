"""Train samples -> packed microbatches.  Labels are shifted here, once.

Every rank of a data-parallel replica calls this with the same samples and gets the same microbatches; replicas get
disjoint ones, equally many (an empty microbatch takes part in every collective).  Denominators (:class:`BatchTotals`)
are computed over all samples before anything is split or left out, so how the work is packed or dealt out changes
neither loss nor gradient.  ``packing.py`` decides what lies together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from megatron_rest.data.alignment import UNALIGNED, PackingAlignment, round_up
from megatron_rest.data.packing import ROWS_ONLY, RowCost, deal, shared_rows
from megatron_rest.types import BatchTotals, MicroBatch, TokenRegion, TrainBatch, TrainSample

__all__ = ["batch_totals", "make_microbatch", "make_train_batch", "pad_microbatch"]


def make_train_batch(
    samples: Sequence[TrainSample],
    *,
    max_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    alignment: PackingAlignment = UNALIGNED,
    num_microbatches_multiple: int = 1,
    min_microbatches: int = 1,
    is_sharing: bool = False,
    cost: RowCost = ROWS_ONLY,
    totals: BatchTotals | None = None,
) -> TrainBatch:
    """Pack ``samples`` of one optimiser step and return the share of ``dp_rank``.

    Args:
        samples: of ALL data-parallel ranks, in the same order everywhere.
        max_tokens: most rows of one microbatch, rounded up to ``alignment``; a longer sample raises ``ValueError``
            (nothing is cut).
        alignment: multiples that sequences and microbatches are padded to.
        num_microbatches_multiple: pipeline size under interleaved schedules, else 1.
        min_microbatches: microbatches that every replica should get if there are samples enough: a pipeline idles
            less with several small ones than with one large one.
        is_sharing: whether the rows that samples of one ``group_id`` begin with are there once for all of them.
        cost: of rows, for even work.
        totals: denominators, where ``samples`` are not all of the step: those left out have no gradient, and count.
            None: all there is.

    Raises ValueError if there are no samples and no ``totals``.
    """
    if not samples and totals is None:
        raise ValueError("no samples to train on")
    present = batch_totals(samples)
    replicas, report = deal(
        samples,
        max_rows=round_up(max_tokens, alignment.sequence),
        dp_size=dp_size,
        multiple=num_microbatches_multiple,
        min_bins=max(min_microbatches, 1),
        row_multiple=alignment.sequence,
        length_multiple=alignment.total,
        is_sharing=is_sharing,
        cost=cost,
    )
    microbatches = [
        make_microbatch(
            [samples[i] for part in parts for i in part.members],
            alignment=alignment,
            shared_by=[len(part.members) for part in parts] if is_sharing else None,
        )
        for parts in replicas[dp_rank]
    ]
    totals = present if totals is None else totals
    left_out = int(totals.num_tokens - present.num_tokens)
    if left_out and dp_rank == 0:
        microbatches[0] = replace(microbatches[0], left_out_tokens=left_out)
    return TrainBatch(microbatches=tuple(microbatches), totals=totals, packing=report)


def batch_totals(samples: Sequence[TrainSample]) -> BatchTotals:
    """Denominators over all samples of an optimiser step (weights are mean 1 per sequence, so they sum to the
    tokens).
    """
    counts = [s.num_loss_tokens for s in samples]
    return BatchTotals(
        num_tokens=float(sum(counts)),
        num_sequences=float(sum(c > 0 for c in counts)),
        weight_sum=float(sum(counts)),
    )


def make_microbatch(
    samples: Sequence[TrainSample],
    *,
    alignment: PackingAlignment = UNALIGNED,
    shared_by: Sequence[int] | None = None,
) -> MicroBatch:
    """Pack ``samples`` into one microbatch.

    Every sequence or segment is padded to ``alignment.sequence``; a last, masked one fills up to ``alignment.total``.
    ``shared_by`` says how many consecutive samples each have their common first rows once; None: nobody shares.
    """
    segments: list[tuple[TrainSample, int, int]] = []  # sample, its first row here, the row behind its last
    parents: list[int] = []
    is_owned: list[bool] = []
    left = iter(samples)
    for size in [1] * len(samples) if shared_by is None else shared_by:
        members = list(islice(left, size))
        shared = shared_rows(members, multiple=alignment.sequence)
        parent = len(segments) if shared else -1
        if shared:
            segments.append((members[0], 0, shared))
            parents.append(-1)
            is_owned.append(False)
        for sample in members:
            segments.append((sample, shared, len(sample.token_ids) - 1))
            parents.append(parent)
            is_owned.append(True)
    spans = [round_up(end - start, alignment.sequence) for _, start, end in segments]
    total = sum(spans)
    padding = -total % alignment.total if total else alignment.total
    bounds = np.cumsum([0, *spans, *([padding] if padding else [])])
    columns = _empty_columns(int(bounds[-1]))
    columns["position_ids"] = np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))
    for (sample, start, end), span, owned, first in zip(segments, spans, is_owned, bounds, strict=False):
        here, there = slice(first, first + end - start), slice(start + 1, end + 1)
        columns["token_ids"][here] = sample.token_ids[start:end]
        columns["position_ids"][first : first + span] += start
        if not owned:
            continue
        columns["labels"][here] = sample.token_ids[there]
        columns["loss_mask"][here] = sample.loss_mask[there]
        columns["region_ids"][here] = sample.region_ids[there]
        columns["sequence_ids"][here] = sample.sequence_id
        columns["sequence_lengths"][here] = max(int(sample.loss_mask.sum()), 1)
        columns["advantages"][here] = sample.advantage
        columns["rollout_log_probs"][here] = sample.rollout_log_probs[there]
    tensors: dict[str, Any] = {name: torch.from_numpy(column) for name, column in columns.items()}
    if padding:
        parents.append(-1)
    continues = torch.tensor(parents) if any(parent >= 0 for parent in parents) else None
    return MicroBatch(cu_seqlens=torch.from_numpy(bounds.astype(np.int32)), parents=continues, **tensors)


def pad_microbatch(microbatch: MicroBatch, length: int) -> MicroBatch:
    """The same microbatch with one more masked sequence, so that it has ``length`` rows."""
    missing = length - len(microbatch.token_ids)
    if missing == 0:
        return microbatch
    padding = _empty_columns(missing)
    padding["position_ids"] = np.arange(missing)
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(microbatch, name), torch.from_numpy(column)]) for name, column in padding.items()
    }
    for name in ("old_log_probs", "token_weights", "ref_log_probs"):
        column = getattr(microbatch, name)
        if column is not None:
            tensors[name] = torch.cat([column, column.new_zeros(missing)])
    if microbatch.parents is not None:
        tensors["parents"] = torch.cat([microbatch.parents, torch.tensor([-1])])
    bounds = torch.cat([microbatch.cu_seqlens, torch.tensor([length], dtype=torch.int32)])
    return replace(microbatch, cu_seqlens=bounds, **tensors)


def _empty_columns(size: int) -> dict[str, np.ndarray]:
    """Of rows that belong to no sequence."""
    return {
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
