"""The policy head on Megatron's last pipeline stage: hidden states in, log-probs and entropy of the labels out.

:class:`PolicyHead` has the signature of Megatron's ``output_processor``; ``output.py`` puts it into a model.  Two forms
of one result:

fused   Straight from the hidden states (``ops.fused_linear``, ``ops.policy_step``): logits exist one block of rows at a
        time, in float32 whatever the weight is, and only rows with loss are projected.  A token-separable loss is
        differentiated within the forward pass, three matrix products; any other loss costs a fourth.
logits  ``output_layer`` projects every row, the gradient then overwrites its logits.  For output layers that are not
        Megatron's plain ``ColumnParallelLinear`` (adapters, quantised heads).

Both go *through* ``output_layer``: it is called as Megatron calls it, with the shared embedding where the weights are
tied, so what others have hooked to it runs (DistributedDataParallel waits there for gathered parameters).  Weight
gradients go where the layer's own would: through autograd, or into ``main_grad`` under gradient accumulation fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_rest.ops import (
    TokenLogProbs,
    TokenLoss,
    linear_log_probs_and_entropy,
    policy_step,
    vocab_parallel_log_probs_and_entropy,
)

__all__ = ["HeadContext", "PolicyHead", "PolicyOutput", "check_fusable"]

# The promise that lets d_weight go into main_grad during the forward pass: Megatron hands the loss a gradient of 1 (the
# division by the token count comes after the step).  float16's loss scale breaks it; see _differentiates_in_forward.
_LOSS_GRADIENT = 1.0


LogitScale = Callable[[Tensor], Tensor]


class PolicyOutput(NamedTuple):
    """What ``model(..., labels=labels)`` returns with a head; mixed-precision wrappers turn it into a plain tuple."""

    log_probs: Tensor  # float32 [b, s], nats; 0 on rows that were not projected.  Constant beside a loss_sum
    entropy: Tensor  # float32 [b, s], nats; likewise
    beta: Tensor | None = None  # float32 [b, s], constant; inside output.measuring_beta
    loss_sum: Tensor | None = None  # scalar float32; the loss, where HeadContext.token_loss was used; it has the graph
    sum_p2: Tensor | None = None  # float32 [b, s], constant, sum of squared probabilities; beside beta


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadContext:
    """What a step tells the head: ``model(..., output_processor_context=context)``.  Rows are numbered in ``[s, b]``
    order, row = position * b + sample.
    """

    active_rows: Tensor | None = None  # int64 on the CPU, strictly increasing: rows with loss; None = all
    loss_mask: Tensor | None = None  # bool [s * b]: where it is False a label may be anything (-100, padding)
    token_loss: TokenLoss | None = None  # loss of a row from its own log-prob and entropy; None: the caller's affair


class PolicyHead:
    """Megatron's ``output_processor`` for policy losses.

    Args:
        vocab_size: true vocabulary size; columns beyond it (padding of the embedding) are not part of the softmax.
        temperature: logits are divided by it, as the sampler does.
        form: "fused" or "logits".

    Collectives over the output layer's tensor-parallel group: one all-gather of 16 bytes a projected row (20 with
    beta), and, fused, the hidden states as ``ops.fused_linear`` says.
    """

    def __init__(self, *, vocab_size: int | None, temperature: float, form: str) -> None:
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.form = form
        self.with_beta = False

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        labels: Tensor,
        output_weight: Tensor | None = None,
        context: HeadContext | None = None,
        scale_logits: LogitScale | None = None,
        **others: Any,
    ) -> PolicyOutput:
        """``hidden_states`` [s, b, H] ([s / TP, b, H] under sequence parallelism), ``labels`` [b, s] global ids."""
        context = context or HeadContext()
        rows = labels.transpose(0, 1).contiguous()
        if context.loss_mask is not None:  # on a device nobody can look which labels are out of range
            rows = torch.where(context.loss_mask.view(rows.shape), rows, 0)
        if self.form == "fused":
            scores, loss_sum = self._fused(hidden_states, output_layer, output_weight, rows, context)
        else:
            scores, loss_sum = self._from_logits(hidden_states, output_layer, output_weight, rows, scale_logits), None
        beta = self._beta(hidden_states, output_layer, scores.collision)
        return PolicyOutput(
            log_probs=scores.log_probs.transpose(0, 1),
            entropy=scores.entropy.transpose(0, 1),
            beta=None if beta is None else beta.transpose(0, 1),
            loss_sum=loss_sum,
            sum_p2=None if scores.collision is None else scores.collision.transpose(0, 1),
        )

    def _from_logits(
        self,
        hidden: Tensor,
        layer: Any,
        weight: Tensor | None,
        labels: Tensor,
        scale: LogitScale | None,
    ) -> TokenLogProbs:
        logits, _ = layer(hidden, weight=weight, runtime_gather_output=False)
        return vocab_parallel_log_probs_and_entropy(
            logits if scale is None else scale(logits),
            labels,
            tp_group=_sharded(layer.tp_group),
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            consume=torch.is_grad_enabled(),  # nobody else holds the logits: the gradient overwrites them
            with_collision=self.with_beta,
        )

    def _fused(
        self, hidden: Tensor, layer: Any, weight: Tensor | None, labels: Tensor, context: HeadContext
    ) -> tuple[TokenLogProbs, Tensor | None]:
        def project(
            input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
        ) -> tuple[tuple[TokenLogProbs, Tensor | None], None]:
            matrix = layer.weight if weight is None else weight
            where = {
                "tp_group": _sharded(layer.tp_group),
                "temperature": self.temperature,
                "vocab_size": self.vocab_size,
                "sequence_parallel": layer.sequence_parallel,
                "active_rows": context.active_rows,
            }
            fuses_gradient = layer.gradient_accumulation_fusion and torch.is_grad_enabled() and matrix.requires_grad
            if context.token_loss is not None and self._differentiates_in_forward(input_):
                step = policy_step(
                    input_, matrix, labels, context.token_loss,
                    main_grad_scale=_LOSS_GRADIENT if fuses_gradient else None, **where,
                )  # fmt: skip
                return (TokenLogProbs(step.log_probs, step.entropy), step.loss_sum), None
            scores = linear_log_probs_and_entropy(
                input_, matrix, labels,
                with_collision=self.with_beta, gradient_accumulation_fusion=fuses_gradient, **where,
            )  # fmt: skip
            return (scores, None), None

        with _standing_in(layer, project):
            result, _ = layer(hidden, weight=weight)
        return result

    def _differentiates_in_forward(self, hidden: Tensor) -> bool:
        # float16 gradients underflow before the loss scale, which only the backward pass knows, has multiplied them.
        return torch.is_grad_enabled() and not self.with_beta and hidden.dtype is not torch.float16

    def _beta(self, hidden: Tensor, layer: Any, collision: Tensor | None) -> Tensor | None:
        if collision is None:
            return None
        squared_norm = torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=torch.float32).square()
        if layer.sequence_parallel:
            squared_norm = _gather_sequence(squared_norm, layer.tp_group)
        return squared_norm * (1.0 - collision).clamp_min(0.0) / self.temperature**2


def check_fusable(layer: Any, config: Any) -> None:
    """Raise ``ValueError`` if ``layer`` does more than multiply by a weight: the fused head would leave that out."""
    reasons = {
        f"output_layer is a {type(layer).__name__} with a forward of its own": (
            not isinstance(layer, ColumnParallelLinear) or type(layer).forward is not ColumnParallelLinear.forward
        ),
        "someone has put another forward on it": "forward" in vars(layer),
        "output_layer has a bias": getattr(layer, "bias", None) is not None,
        "config.defer_embedding_wgrad_compute postpones its weight gradient": config.defer_embedding_wgrad_compute,
        "config.use_mup scales its logits": getattr(config, "use_mup", False),  # these two came with 0.18
        "its weight is sharded once more (GTP)": getattr(layer, "gtp_remat_size", 1) > 1,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"the fused head multiplies hidden states by the output weight itself, but {'; '.join(found)}: use "
            'form="logits" (model.head=logits)'
        )


@contextmanager
def _standing_in(layer: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """For the length of one call ``layer.forward`` is ours: the hooks of the layer run around it."""
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _sharded(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    return group if group.size() > 1 else None


def _gather_sequence(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[s / TP, b]`` of every rank -> ``[s, b]``, in rank order as Megatron shards the sequence."""
    whole = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
    return whole
