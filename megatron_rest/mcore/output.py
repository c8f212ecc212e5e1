"""THE seam into Megatron's cross-entropy path: log-probs and entropy where the language-model loss was.

``GPTModel.forward(labels=...)`` on the last pipeline stage projects hidden states through its own ``output_layer``
(tied or untied weights, sequence parallelism and DDP hooks as they are) and hands ``(labels, vocab-parallel logits)``
to ``compute_language_model_loss``.  :func:`attach` puts our op into that one place of one model instance; nothing
global changes and :func:`detach` gives the model back as it was.

    attach(model, vocab_size=151936)
    out = model(tokens, position_ids, None, labels=labels)      # [2, b, s] float32
    log_probs, entropy = out                                    # both differentiable

The logits are the model's own scratch: nobody else holds them, so the gradient overwrites them (``consume=True``) and
no second vocabulary-sized tensor is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rest.ops import vocab_parallel_log_probs_and_entropy

__all__ = ["attach", "detach", "is_attached"]

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
    tp_group = model.pg_collection.tp

    def log_probs_and_entropy(labels: Tensor, logits: Tensor) -> Tensor:
        """``labels`` [b, s] global ids, ``logits`` [s, b, V/TP] -> [2, b, s] float32."""
        scores = vocab_parallel_log_probs_and_entropy(
            logits,
            labels.transpose(0, 1).contiguous(),
            tp_group=tp_group if tp_group.size() > 1 else None,
            temperature=temperature,
            vocab_size=vocab_size,
            consume=torch.is_grad_enabled(),
        )
        return torch.stack([scores.log_probs.transpose(0, 1), scores.entropy.transpose(0, 1)])

    # An instance attribute shadows the method: reversible, and other models of this class are not touched.
    object.__setattr__(model, _SEAM, log_probs_and_entropy)


def detach(model: Any) -> None:
    """Give ``model`` Megatron's own cross-entropy back.  Harmless if nothing was attached."""
    model.__dict__.pop(_SEAM, None)


def is_attached(model: Any) -> bool:
    """Whether :func:`attach` is in force on this instance."""
    return _SEAM in model.__dict__
