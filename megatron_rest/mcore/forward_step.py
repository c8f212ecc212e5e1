"""Megatron's ``forward_step`` / ``loss_func`` contract for losses over log-probs and entropy.

In a Megatron loop of one's own these are the two lines that change:

    step = partial(forward_step, loss=partial(rest_policy_loss, config=loss_config), totals=batch.totals)
    losses = forward_backward_func(forward_step_func=step, data_iterator=iter(batch.microbatches), ...)

``loss_func`` returns Megatron's 3-tuple ``(loss_sum, num_tokens, {name: (sum, count)})``; the model's config must have
``calculate_per_token_loss=True``, so that Megatron divides by the token count of the whole global batch and no split
of the work changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rest.types import BatchTotals, LossInputs, LossOutput, MicroBatch

__all__ = ["PolicyLoss", "forward_step", "loss_inputs", "packed_seq_params", "score_step"]

PolicyLoss = Callable[[LossInputs], LossOutput]


def packed_seq_params(microbatch: MicroBatch) -> PackedSeqParams:
    """Megatron's description of packed sequences."""
    longest = int((microbatch.cu_seqlens[1:] - microbatch.cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _forward(microbatch: MicroBatch, model: Any) -> Tensor:
    return model(
        microbatch.token_ids.unsqueeze(0),
        microbatch.position_ids.unsqueeze(0),
        None,  # causal by construction
        labels=microbatch.labels.unsqueeze(0),
        packed_seq_params=packed_seq_params(microbatch),
    )


def loss_inputs(microbatch: MicroBatch, output: Tensor, totals: BatchTotals) -> LossInputs:
    """``output`` [2, 1, T] of a model with :func:`megatron_rest.mcore.output.attach` -> typed loss arguments."""
    log_probs, entropy = output[0, 0], output[1, 0]
    old = microbatch.old_log_probs
    return LossInputs(
        log_probs=log_probs,
        entropy=entropy,
        old_log_probs=log_probs.detach() if old is None else old,
        advantages=microbatch.advantages,
        loss_mask=microbatch.loss_mask,
        sequence_lengths=microbatch.sequence_lengths,
        sequence_ids=microbatch.sequence_ids,
        token_weights=microbatch.token_weights,
        rollout_log_probs=microbatch.rollout_log_probs,
        totals=totals,
    )


def forward_step(
    data_iterator: Iterator[MicroBatch], model: Any, *, loss: PolicyLoss, totals: BatchTotals
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]]]:
    """Training pass of one microbatch: Megatron's ``forward_step_func`` once ``loss`` and ``totals`` are bound."""
    microbatch = next(data_iterator)

    def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        out = loss(loss_inputs(microbatch, output, totals))
        return out.loss_sum, out.num_tokens.to(torch.int), dict(out.metrics)

    return _forward(microbatch, model), loss_func


def score_step(data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    """Scoring pass (forward only).

    The schedule's result is the list of ``[2, T]`` float32 outputs of the last stage (``[3, T]`` with beta).
    """
    microbatch = next(data_iterator)
    return _forward(microbatch, model), _scores


def _scores(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros((), device=output.device)
    return zero, zero.to(torch.int), output[:, 0].detach().clone()
