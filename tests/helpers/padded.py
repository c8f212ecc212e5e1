"""A plain Megatron loop over padded ``[b, s]`` batches: what a pipeline of one's own does with ``StepLoss``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_rest.data.batching import batch_totals
from megatron_rest.mcore.context_parallel import zigzag_order
from megatron_rest.mcore.step_loss import LossTokens, PolicyLoss, StepLoss
from megatron_rest.trainer.setup import PolicyParts
from megatron_rest.types import TrainSample

_MULTIPLE = 8  # 2 CP x TP of every layout here


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """``tokens`` and ``labels`` [b, s] of this context-parallel rank, and what the loss knows, in row order [s * b]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss: LossTokens


def padded_update(
    parts: PolicyParts,
    samples: list[TrainSample],
    columns: Mapping[int, dict[str, np.ndarray]],
    loss: PolicyLoss,
    *,
    micro_batch_size: int,
) -> tuple[float, float]:
    """One optimiser step over all ``samples``; loss and gradient norm.

    ``columns``: sequence id -> ``old_log_probs`` and ``token_weights`` of each label.
    """
    policy, context = parts.policy, parts.context
    mine = samples[context.dp_rank :: context.dp_size]
    # One length for all: stages exchange hidden states of a fixed shape.
    length = max(len(s.token_ids) - 1 for s in mine)
    length += -length % _MULTIPLE
    starts = range(0, len(mine), micro_batch_size)
    batches = [_padded_batch(parts, mine[i : i + micro_batch_size], samples, columns, length) for i in starts]
    for chunk in policy.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    interleaved = len(policy.chunks) > 1
    iterators = [iter(batches) for _ in policy.chunks]
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, loss=loss),
        data_iterator=iterators if interleaved else iterators[0],
        model=policy.chunks if interleaved else policy.chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=micro_batch_size,
        forward_only=False,
    )
    _, grad_norm, _ = policy.optimizer.step()
    total = torch.stack([r["loss"] for r in results]).sum(0).double() if results else torch.zeros(2, dtype=torch.double)
    total = total.to(context.device)
    dist.all_reduce(total, group=context.dp_cp_group)
    if context.pp_size > 1:
        dist.broadcast(total, src=context.last_stage_rank, group=context.pp_group)
    return float(total[0] / total[1]), float(grad_norm)


def _forward_step(data_iterator: Iterator[PaddedBatch], model: Any, *, loss: PolicyLoss) -> tuple[Any, StepLoss]:
    batch = next(data_iterator)
    step = StepLoss(loss, batch.loss)
    positions = torch.zeros_like(batch.tokens)  # rotary embedding counts by itself
    output = model(batch.tokens, positions, None, labels=batch.labels, output_processor_context=step.context)
    return output, step


def _padded_batch(
    parts: PolicyParts,
    rows: list[TrainSample],
    samples: list[TrainSample],
    columns: Mapping[int, dict[str, np.ndarray]],
    length: int,
) -> PaddedBatch:
    mine = zigzag_order(torch.tensor([length]), parts.context.cp_size)[parts.context.cp_rank]

    def table(values: list[np.ndarray]) -> torch.Tensor:
        padded = np.stack([np.pad(v, (0, length - len(v))) for v in values])
        return torch.from_numpy(padded)[:, mine].to(parts.context.device)

    def in_rows(values: list[np.ndarray]) -> torch.Tensor:
        return table(values).transpose(0, 1).reshape(-1)

    mask = in_rows([s.loss_mask[1:] for s in rows])
    ones = [np.ones(len(s.token_ids) - 1, np.float32) for s in rows]
    return PaddedBatch(
        tokens=table([s.token_ids[:-1].astype(np.int64) for s in rows]),
        labels=table([s.token_ids[1:].astype(np.int64) for s in rows]),
        loss=LossTokens(
            loss_mask=mask,
            active_rows=mask.cpu().nonzero()[:, 0],
            advantages=in_rows([x * np.float32(s.advantage) for x, s in zip(ones, rows, strict=True)]),
            sequence_lengths=in_rows([x * s.loss_mask.sum(dtype=np.float32) for x, s in zip(ones, rows, strict=True)]),
            old_log_probs=in_rows([columns[s.sequence_id]["old_log_probs"] for s in rows]),
            token_weights=in_rows([columns[s.sequence_id]["token_weights"] for s in rows]),
            totals=batch_totals(samples),
        ),
    )
