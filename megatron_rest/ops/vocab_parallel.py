"""Log-probability and entropy of every token from vocabulary-parallel logits: one pass, one collective, one gradient.

The forward pass reads the local logits once and keeps four numbers a row: maximum, sum of exponentials, *centred*
sum (for the entropy) and the label's logit.  One all-gather of these (16 bytes per token and rank) makes every rank
fold the same numbers in the same order, so the results agree bit for bit within the group.  Nothing vocabulary-sized is
saved: the backward pass recomputes the softmax from the logits, which the caller has anyway, and from 12 bytes a token.
It needs no collective.  ``row_statistics`` has the formulas.

The trade taken: exp is computed twice, and in exchange memory traffic falls to one read in the forward pass and one
read and one write in the backward pass.  With ``consume=True`` the gradient is written over the logits, so that the
head needs no second vocabulary-sized buffer at all.

Left out: derivatives of the gradient (second order), and gradients of the collision probability.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.ops.agreement import check_first_call
from megatron_rest.ops.distributed_tensor import local_logits
from megatron_rest.ops.row_blocks import Scratch, write_gradient, write_partials
from megatron_rest.ops.row_statistics import GradientRule, compute_dtype, fold_partials
from megatron_rest.ops.sharding import VocabShard

__all__ = ["TokenLogProbs", "vocab_parallel_log_probs_and_entropy"]


class TokenLogProbs(NamedTuple):
    """Per-token results in the shape of ``labels``, fp32 (float64 for float64 input), equal on every TP rank."""

    log_probs: Tensor  # log-prob of the label, nats; differentiable
    entropy: Tensor  # entropy of the whole distribution, nats; differentiable
    collision: Tensor | None = None  # sum of p^2, in (0, 1]; a constant; None unless asked for


def vocab_parallel_log_probs_and_entropy(
    vocab_parallel_logits: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    consume: bool = False,
    with_collision: bool = False,
    ignore_index: int | None = None,
) -> TokenLogProbs:
    """Log-prob of each label and entropy of each row of softmax(logits / temperature), both differentiable.

    Collectives: one all-gather over ``tp_group`` in the forward pass (4 numbers a token, 5 with the collision), none in
    the backward pass.  Every rank of the group must call it with the same labels: at a group's first call one more
    all-gather compares them, and the shards (``agreement``).

    Args:
        vocab_parallel_logits: [..., V/TP], any floating dtype and any strides; this rank's columns.  Not modified
            unless ``consume``.  -inf columns are allowed and get zero probability and gradient.  A DTensor that is
            ``Shard(-1)`` over one dimension of its mesh (``loss_parallel``) brings its group along.
        labels: [...], integer, GLOBAL vocabulary ids.  Positions without a label take any valid id.
        tp_group: process group the vocabulary is split over; None means unsharded, never the default group.
        temperature: positive; log-probs and entropy are those of the distribution that is sampled at this temperature.
        vocab_size: true vocabulary size where the logits are padded; columns beyond it count as absent.
        consume: hand the logits over: the backward pass writes the gradient into their memory.  They must not be a
            leaf, and nothing else may need them once the backward pass runs (autograd raises if it does); a second
            backward pass raises RuntimeError.
        with_collision: also return sum of p^2 (the squared score norm of a row is ``1 - 2 p_label + collision``, its
            expectation ``1 - collision``).
        ignore_index: label of positions without one (Hugging Face: -100): their log-prob and entropy are 0, without
            gradient.  None: every label is an id.

    Returns:
        log_probs, entropy (nats) and collision or None, each [...].

    Raises:
        ValueError: shapes, dtypes, temperature or ``vocab_size`` do not fit; a label is out of range (on CUDA this is a
            device-side assertion, so that the hot path has no host synchronisation).
    """
    vocab_parallel_logits, labels, tp_group = local_logits(vocab_parallel_logits, labels, tp_group)
    _check_arguments(vocab_parallel_logits, labels, temperature)
    if consume:
        _check_consumable(vocab_parallel_logits)
    shard = VocabShard.create(vocab_parallel_logits.shape[-1], tp_group=tp_group, vocab_size=vocab_size)
    check_first_call(shard, labels, vocab_parallel_logits, names_vocab_size=vocab_size is not None)
    is_label, labels = without_ignored(labels, ignore_index)
    shard.check_labels(labels)
    log_probs, entropy, collision = _VocabParallel.apply(
        vocab_parallel_logits, labels, shard, 1.0 / temperature, consume, with_collision
    )
    return zero_where_ignored(TokenLogProbs(log_probs, entropy, collision), is_label)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        shard: VocabShard,
        inverse_temperature: float,
        consume: bool,
        with_collision: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        flat_labels = labels.reshape(-1)
        partials = torch.empty(
            5 if with_collision else 4, labels.numel(), dtype=compute_dtype(logits.dtype), device=logits.device
        )
        scratch = Scratch(partials.dtype, logits.device)
        is_finite = True
        for matrix, at in _matrices(logits):
            is_finite &= write_partials(matrix, flat_labels[at], shard, inverse_temperature, partials[:, at], scratch)
        stats = fold_partials(shard.all_gather(partials), inverse_temperature)
        ctx.save_for_backward(logits, labels, stats.max_logit, stats.log_sum, stats.entropy)
        ctx.shard, ctx.inverse_temperature, ctx.consume = shard, inverse_temperature, consume
        ctx.is_consumed, ctx.is_finite = False, is_finite
        ctx.set_materialize_grads(False)
        collision = None if stats.collision is None else stats.collision.view(labels.shape).clone()
        if collision is not None:
            ctx.mark_non_differentiable(collision)
        # Copies, not views: callers may change results in place, and the saved entropy must not change with them.
        return stats.log_probs.view(labels.shape).clone(), stats.entropy.view(labels.shape).clone(), collision

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_order("vocab_parallel_log_probs_and_entropy")
        if ctx.is_consumed:
            raise RuntimeError(
                "second backward pass through vocab_parallel_log_probs_and_entropy(..., consume=True): the logits "
                "already hold the gradient of the first one; call it with consume=False to keep the graph"
            )
        logits, labels, max_logit, log_sum, entropy = ctx.saved_tensors
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, None, None, None
        rule = GradientRule.create(
            max_logit=max_logit,
            log_sum=log_sum,
            entropy=entropy,
            grad_log_probs=torch.zeros_like(entropy) if grad_log_probs is None else grad_log_probs.reshape(-1),
            grad_entropy=None if grad_entropy is None else grad_entropy.reshape(-1),
            inverse_temperature=ctx.inverse_temperature,
            is_finite=ctx.is_finite,
        )
        ctx.is_consumed = ctx.consume
        grad_logits = logits.detach() if ctx.consume else torch.empty_like(logits)
        flat_labels = labels.reshape(-1)
        scratch = Scratch(entropy.dtype, logits.device)
        for (matrix, at), (out, _at) in zip(_matrices(logits), _matrices(grad_logits), strict=True):
            write_gradient(matrix, flat_labels[at], ctx.shard, ctx.inverse_temperature, rule[at], out, scratch)
        return grad_logits, None, None, None, None, None


def without_ignored(labels: Tensor, ignore_index: int | None) -> tuple[Tensor | None, Tensor]:
    """Where ``labels`` are ids (None: everywhere), and labels that are all ids."""
    if ignore_index is None:
        return None, labels
    is_label = labels != ignore_index
    return is_label, torch.where(is_label, labels, 0)


def zero_where_ignored(tokens: TokenLogProbs, is_label: Tensor | None) -> TokenLogProbs:
    """Positions without a label say 0 and pass no gradient on."""
    if is_label is None:
        return tokens
    kept = [None if values is None else torch.where(is_label, values, 0.0) for values in tokens]
    return TokenLogProbs(*kept)  # type: ignore[arg-type]


def refuse_second_order(operator: str) -> None:
    """Raise inside a backward pass that was asked for ``create_graph=True``.

    Autograd's own once_differentiable stays silent when the upstream gradient is a constant, and a term of the loss
    would be dropped.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{operator} has no second derivative: its gradient cannot be taken with create_graph=True")


def _matrices(logits: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Views ``[n, V/TP]`` that cover any strided ``[..., V/TP]`` tensor, with their place among its flat rows."""
    begin = 0
    for matrix in _split_to_2d(logits):
        yield matrix, slice(begin, begin + len(matrix))
        begin += len(matrix)


def _split_to_2d(logits: Tensor) -> list[Tensor]:
    if logits.numel() == 0:
        return []
    if logits.dim() <= 2:
        return [logits[None] if logits.dim() == 1 else logits]
    try:
        return [logits.view(-1, logits.shape[-1])]
    except (
        RuntimeError
    ):  # these strides have no 2-D view; a reshape would copy, and consume=True needs the memory itself
        return [matrix for part in logits.unbind(0) for matrix in _split_to_2d(part)]


def _check_arguments(logits: Tensor, labels: Tensor, temperature: float) -> None:
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"vocab_parallel_logits must be [..., V/TP] with labels [...], got logits {list(logits.shape)} and labels "
            f"{list(labels.shape)}: bring both into the same order ([s, b] or [T]) before the call"
        )
    if not logits.is_floating_point() or logits.element_size() == 1:
        raise ValueError(
            f"vocab_parallel_logits must be floating point (bfloat16, float16, float32 or float64), got {logits.dtype}"
        )
    if logits.shape[-1] == 0:
        raise ValueError("vocab_parallel_logits has no columns: every rank must hold V/TP >= 1 of them")
    check_labels_and_temperature(labels, temperature, logits.device)


def check_labels_and_temperature(labels: Tensor, temperature: float, device: torch.device) -> None:
    """The part of the contract that the operators on logits and on hidden states share."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32 vocabulary ids, got {labels.dtype}")
    if labels.device != device:
        raise ValueError(f"labels are on {labels.device}, the model's output on {device}: move one of them")
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}: greedy decoding has no log-probs to train on"
        )


def _check_consumable(logits: Tensor) -> None:
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "consume=True writes the gradient over vocab_parallel_logits, but they are a leaf whose value must "
            "survive: pass the output of the projection, or consume=False"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(
            "consume=True needs logits that own their memory, got an expanded tensor: pass a contiguous copy"
        )
