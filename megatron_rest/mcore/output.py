"""THE seam into Megatron's cross-entropy path: log-probs and entropy where the language-model loss was.

``GPTModel.forward(labels=...)`` on the last pipeline stage projects hidden states through its own ``output_layer``
(tied or untied weights, sequence parallelism and DDP hooks as they are) and hands ``(labels, vocab-parallel logits)``
to ``compute_language_model_loss``.  :func:`attach` puts our op into that one place of one model instance; nothing
global changes and :func:`detach` gives the model back as it was.

    attach(model, vocab_size=151936)
    out = model(tokens, position_ids, None, labels=labels)      # [2, b, s] float32
    log_probs, entropy = out                                    # both differentiable

Reweighting by score norms also needs the hidden states, which that place does not see.  ``with measuring_beta(model):``
hooks the input of ``output_layer`` for as long as it lasts; outside of it nothing is hooked, computed or sent.

The logits are the model's own scratch: nobody else holds them, so the gradient overwrites them (``consume=True``) and
no second vocabulary-sized tensor is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.ops import vocab_parallel_log_probs_and_entropy

__all__ = ["at_temperature", "attach", "detach", "is_attached", "measuring_beta"]

_SEAM = "compute_language_model_loss"


def attach(model: Any, *, vocab_size: int | None = None, temperature: float = 1.0) -> None:
    """Make ``model(..., labels=labels)`` return ``[2, b, s]`` float32: log-probs (nats) and entropy (nats) of each
    label.

    Args:
        model: a ``GPTModel`` chunk (unwrapped).  A chunk without the last pipeline stage is left alone.
        vocab_size: true vocabulary size; columns beyond it (padding of the embedding) are not part of the softmax.
        temperature: logits are divided by it, as the sampler does.

    Collectives: one all-gather of ``[4, b * s]`` float32 over the model's tensor-parallel group.  Idempotent:
        attaching again replaces the settings.  Raises ``RuntimeError`` naming the symbol if this Megatron has moved
        the seam.
    """
    if not getattr(model, "post_process", False):
        return
    if not hasattr(type(model), _SEAM):
        raise RuntimeError(
            f"{type(model).__module__}.{type(model).__name__} has no method {_SEAM}: this Megatron-Core computes its "
            "loss elsewhere; megatron_rest 0.1 supports megatron-core 0.16"
        )
    # An instance attribute shadows the method: reversible, and other models of this class are not touched.
    object.__setattr__(model, _SEAM, _Output(model.pg_collection.tp, vocab_size, temperature))


def detach(model: Any) -> None:
    """Give ``model`` Megatron's own cross-entropy back.  Harmless if nothing was attached."""
    model.__dict__.pop(_SEAM, None)


def is_attached(model: Any) -> bool:
    """Whether :func:`attach` is in force on this instance."""
    return _SEAM in model.__dict__


@contextmanager
def at_temperature(model: Any, temperature: float) -> Iterator[None]:
    """While it lasts, ``model`` scores at another temperature than :func:`attach` was given."""
    output = model.__dict__.get(_SEAM)
    if output is None:
        yield
        return
    before, output.temperature = output.temperature, temperature
    try:
        yield
    finally:
        output.temperature = before


@contextmanager
def measuring_beta(model: Any) -> Iterator[None]:
    """While it lasts, ``model(..., labels=labels)`` returns ``[3, b, s]``: the third row is beta of each position.

    ``beta = ||h||^2 (1 - sum p^2) / temperature^2``, float32, constant: the expected squared Frobenius norm of
    ``d log p(a) / d W`` over ``a ~ p``, for the output matrix ``W`` and the hidden state ``h`` that enters it.  Exact
    for this layer; a proxy for the norm of the whole gradient.  Where p is almost a point mass, ``1 - sum p^2`` is a
    difference of float32 numbers: its absolute error is about 1e-7.

    Collectives, besides those of :func:`attach` (its all-gather carries a fifth number a token): under sequence
    parallelism one all-gather of ``[b * s / TP]`` float32 over the tensor-parallel group.

    ``model`` is an unwrapped chunk with :func:`attach`; one without the last pipeline stage is left alone.
    """
    output = model.__dict__.get(_SEAM)
    if output is None:
        yield
        return
    layer = model.output_layer

    def keep_squared_norm(_: Any, arguments: tuple[Tensor, ...]) -> None:
        hidden = arguments[0].detach()  # [s, b, H], or [s / TP, b, H] under sequence parallelism
        squared_norm = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32).square()
        output.squared_norm = (
            _gather_sequence(squared_norm, output.tp_group) if layer.sequence_parallel else squared_norm
        )

    hook = layer.register_forward_pre_hook(keep_squared_norm)
    try:
        yield
    finally:
        hook.remove()
        output.squared_norm = None


class _Output:
    """What stands in the place of the cross-entropy: ``labels`` [b, s] global ids, ``logits`` [s, b, V/TP]."""

    def __init__(self, tp_group: dist.ProcessGroup, vocab_size: int | None, temperature: float) -> None:
        self.tp_group = tp_group
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.squared_norm: Tensor | None = None  # float32 [s, b] of the hidden states of this forward pass, if wanted

    def __call__(self, labels: Tensor, logits: Tensor) -> Tensor:
        """``[2, b, s]`` float32, or ``[3, b, s]`` inside :func:`measuring_beta`."""
        scores = vocab_parallel_log_probs_and_entropy(
            logits,
            labels.transpose(0, 1).contiguous(),
            tp_group=self.tp_group if self.tp_group.size() > 1 else None,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            consume=torch.is_grad_enabled(),
            with_collision=self.squared_norm is not None,
        )
        rows = [scores.log_probs, scores.entropy]
        if scores.collision is not None and self.squared_norm is not None:
            rows.append(self.squared_norm * (1.0 - scores.collision).clamp_min(0.0) / self.temperature**2)
        return torch.stack([row.transpose(0, 1) for row in rows])


def _gather_sequence(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[s / TP, b]`` of every rank -> ``[s, b]``, in rank order as Megatron shards the sequence."""
    whole = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
    return whole
