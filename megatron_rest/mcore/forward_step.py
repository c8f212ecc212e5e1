"""``forward_step`` functions of the trainer: packed :class:`MicroBatch` in, Megatron's contract out.

    step = partial(forward_step, loss=RestPolicyLoss(loss_config), totals=batch.totals)
    forward_backward_func(forward_step_func=step, data_iterator=iter(batch.microbatches), ...)

A loop with batches of its own writes these few lines itself: ``step_loss.py`` has what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rest.mcore.head import HeadContext, PolicyOutput
from megatron_rest.mcore.step_loss import LossTokens, PolicyLoss, StepLoss
from megatron_rest.types import BatchTotals, MicroBatch

__all__ = ["forward_step", "packed_seq_params", "score_step"]


def packed_seq_params(microbatch: MicroBatch) -> PackedSeqParams:
    """Megatron's description of packed sequences; what fills a sequence up counts as part of it."""
    longest = int((microbatch.cu_seqlens[1:] - microbatch.cu_seqlens[:-1]).max())
    # Transformer Engine's context parallelism wants the padded bounds named, and takes a slower kernel where they are.
    padded = microbatch.cu_seqlens if microbatch.cp_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _forward(microbatch: MicroBatch, model: Any, context: HeadContext) -> Any:
    return model(
        microbatch.token_ids.unsqueeze(0),
        microbatch.position_ids.unsqueeze(0),
        None,  # causal by construction
        labels=microbatch.labels.unsqueeze(0),
        packed_seq_params=packed_seq_params(microbatch),
        output_processor_context=context,
    )


def forward_step(
    data_iterator: Iterator[MicroBatch], model: Any, *, loss: PolicyLoss, totals: BatchTotals
) -> tuple[Any, StepLoss]:
    """Training pass of one microbatch: Megatron's ``forward_step_func`` once ``loss`` and ``totals`` are bound."""
    microbatch = next(data_iterator)
    step = StepLoss(loss, LossTokens.of_microbatch(microbatch, totals))
    return _forward(microbatch, model, step.context), step


def score_step(data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Any, Callable[..., Any]]:
    """Scoring pass (forward only).

    The schedule's result is the list of ``[2, T]`` float32 outputs of the last stage (``[3, T]`` with beta).  Rows
    without loss hold 0 where the head does not project them.
    """
    microbatch = next(data_iterator)
    return _forward(microbatch, model, HeadContext(active_rows=microbatch.active_rows)), _scores


def _scores(output: PolicyOutput) -> tuple[Tensor, Tensor, Tensor]:
    output = PolicyOutput(*output)
    rows = [row[0].detach() for row in (output.log_probs, output.entropy, output.beta) if row is not None]
    zero = torch.zeros((), device=rows[0].device)
    return zero, zero.to(torch.int), torch.stack(rows)
