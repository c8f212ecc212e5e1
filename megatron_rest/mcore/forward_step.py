"""``forward_step`` functions of the trainer: packed :class:`MicroBatch` in, Megatron's contract out.

    step = partial(forward_step, loss=RestPolicyLoss(loss_config), totals=batch.totals)
    forward_backward_func(forward_step_func=step, data_iterator=iter(batch.microbatches), ...)

A loop with batches of its own writes these few lines itself: ``step_loss.py`` has what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rest.mcore.head import HeadContext, PolicyOutput
from megatron_rest.mcore.segments import segment_params
from megatron_rest.mcore.step_loss import LossTokens, PolicyLoss, StepLoss
from megatron_rest.types import BatchTotals, MicroBatch

__all__ = ["SCORES", "forward_step", "packed_seq_params", "score_step"]

SCORES = "scores"
"""What a training pass calls its log-probs and entropy, [2, T], among the results of a microbatch."""


def packed_seq_params(microbatch: MicroBatch) -> PackedSeqParams:
    """Megatron's description of packed sequences; what fills a sequence up counts as part of it."""
    if microbatch.parents is not None:
        return segment_params(microbatch)
    longest = max(end - start for start, end in pairwise(microbatch.bounds))
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
    data_iterator: Iterator[MicroBatch],
    model: Any,
    *,
    loss: PolicyLoss,
    totals: BatchTotals,
    with_scores: bool = False,
) -> tuple[Any, Callable[..., Any]]:
    """Training pass of one microbatch: Megatron's ``forward_step_func`` once ``loss`` and ``totals`` are bound.

    ``with_scores`` adds the log-probs and entropy of its rows, detached, to the results under :data:`SCORES`.
    """
    microbatch = next(data_iterator)
    step = StepLoss(loss, LossTokens.of_microbatch(microbatch, totals))
    output = _forward(microbatch, model, step.context)
    return output, partial(_with_scores, step) if with_scores else step


def _with_scores(step: StepLoss, output: PolicyOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss_sum, num_tokens, results = step(output)
    log_probs, entropy, *_ = output
    return loss_sum, num_tokens, results | {SCORES: torch.stack([log_probs[0].detach(), entropy[0].detach()])}


def score_step(data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Any, Callable[..., Any]]:
    """Scoring pass (forward only).

    The schedule's result is the list of ``[2, T]`` float32 outputs of the last stage (``[4, T]`` with beta and sum
    p^2).  Rows without loss hold 0 where the head does not project them.
    """
    microbatch = next(data_iterator)
    return _forward(microbatch, model, HeadContext(active_rows=microbatch.active_rows)), _scores


def _scores(output: PolicyOutput) -> tuple[Tensor, Tensor, Tensor]:
    output = PolicyOutput(*output)
    found = (output.log_probs, output.entropy, output.beta, output.sum_p2)
    rows = [row[0].detach() for row in found if row is not None]
    zero = torch.zeros((), device=rows[0].device)
    return zero, zero.to(torch.int), torch.stack(rows)
