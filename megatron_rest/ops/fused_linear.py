"""Log-prob and entropy straight from hidden states: the logits exist one block of rows at a time, and never in bf16.

Forward, per block: logits = x W^T in fp32, reduced at once to four numbers a row; one all-gather joins the ranks.
Backward, per block: the logits are computed again, turned into their own gradient in place, and multiplied into
d_hidden and d_weight.  Saved are the hidden states (this rank's shard), the weight and 12 bytes a row.

The trade taken: four matrix products instead of three, for no vocabulary-sized memory and for results that any loss can
use.  Where the loss of a token depends on that token alone, ``policy_step`` needs three.

Under ``torch.no_grad`` the forward pass alone is the scoring pass of old or reference policies: nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.ops.agreement import check_first_call
from megatron_rest.ops.distributed_tensor import refuse_distributed
from megatron_rest.ops.fp8 import Fp8Products
from megatron_rest.ops.projection import (
    accumulate_weight_gradient,
    default_block_size,
    hidden_gradient,
    new_block,
    project,
)
from megatron_rest.ops.row_blocks import Scratch, write_gradient, write_partials
from megatron_rest.ops.row_route import RowRoute
from megatron_rest.ops.row_statistics import GradientRule, compute_dtype, fold_partials
from megatron_rest.ops.sharding import VocabShard
from megatron_rest.ops.vocab_parallel import (
    TokenLogProbs,
    check_labels_and_temperature,
    refuse_second_order,
    without_ignored,
    zero_where_ignored,
)

__all__ = ["LogitBlocks", "WeightGradient", "check_linear_arguments", "linear_log_probs_and_entropy"]


def linear_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    active_rows: Tensor | None = None,
    block_size: int | None = None,
    with_collision: bool = False,
    gradient_accumulation_fusion: bool = False,
    fp8_gradients: bool = False,
    reduce_in_fp32: bool = True,
    ignore_index: int | None = None,
) -> TokenLogProbs:
    """Log-prob of each label and entropy of each row of softmax(hidden @ weight^T / temperature), both differentiable.

    Differentiable in ``hidden`` and ``weight``.  Collectives over ``tp_group``: forward, one all-gather of 16 bytes a
    row and rank; backward, one all-reduce of d_hidden.  Sequence parallel: an all-gather of the projected rows in both
    passes and a reduce-scatter of d_hidden in place of the all-reduce.  The caller must not reduce d_hidden once more.

    Args:
        hidden: [..., H], the same on every rank; with ``sequence_parallel`` this rank's 1/TP of the first dimension.
        weight: [V/TP, H], dtype of ``hidden``; the output projection or the tied embedding.
        labels: [...], integer, GLOBAL vocabulary ids, of the whole sequence on every rank.
        tp_group: process group the vocabulary is split over; None means unsharded.
        temperature: positive.
        vocab_size: true vocabulary size where the weight is padded.  Padded rows get zero gradient.
        sequence_parallel: the hidden states are split over ``tp_group`` along their first dimension.
        active_rows: int64 on the CPU, strictly increasing: the flattened positions that carry loss, the same on every
            rank.  Others are not projected: their log_probs and entropy are 0, their d_hidden is 0.
        block_size: rows of a logits block; None picks 64 MiB on CPU and 512 MiB on CUDA.
        with_collision: also return sum of p^2, a constant.
        gradient_accumulation_fusion: Megatron's contract of that name: d_weight is added to ``weight.main_grad``
            (fp32) in the backward pass, and if the weight has the attribute ``grad_added_to_main_grad`` it is set to
            True and a zero gradient is returned so that its hooks run.  Otherwise d_weight is summed in fp32 and
            returned in the dtype of the weight.
        fp8_gradients: multiply d_hidden and d_weight in FP8 (e4m3, a scale a row); log-probs and entropy do not change.
        reduce_in_fp32: sum the ranks' parts of d_hidden in fp32 and round once: 4 bytes an element travel.  False sums
            them in the dtype of ``hidden``, as Megatron's linear layer does: in bf16 half the bytes, and an error of up
            to 4e-3 instead of 2e-3.
        ignore_index: as in ``vocab_parallel_log_probs_and_entropy``.

    Returns:
        log_probs, entropy (nats), collision or None, each [...] like ``labels``, fp32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes, options or labels do not fit (labels on CUDA: a device-side assertion).
        RuntimeError: ``fp8_gradients`` where the hardware or the torch release has no such products.
    """
    check_linear_arguments(hidden, weight, labels, temperature, tp_group if sequence_parallel else None)
    is_label, labels = without_ignored(labels, ignore_index)
    blocks = LogitBlocks.create(
        weight, labels, tp_group=tp_group, temperature=temperature, vocab_size=vocab_size, active_rows=active_rows,
        sequence_parallel=sequence_parallel, block_size=block_size, fp8_gradients=fp8_gradients,
        reduce_in_fp32=reduce_in_fp32,
    )  # fmt: skip
    main_grad_owner = weight if gradient_accumulation_fusion else None
    if main_grad_owner is not None:
        WeightGradient.check_main_grad(weight)
    tokens = TokenLogProbs(*_FusedLinear.apply(hidden, weight, blocks, main_grad_owner, with_collision))
    return zero_where_ignored(tokens, is_label)


class LogitBlocks:
    """What both fused operators share: the labels of the projected rows, and a loop over blocks of logits."""

    def __init__(
        self,
        *,
        shard: VocabShard,
        route: RowRoute,
        labels: Tensor,
        shape: torch.Size,
        temperature: float,
        size: int,
        fp8: Fp8Products | None,
        reduce_in_fp32: bool,
    ) -> None:
        self.shard = shard
        self.route = route
        self.labels = labels  # [A], of the projected rows
        self.shape = shape  # of the labels as the caller gave them
        self.inverse_temperature = 1.0 / temperature
        self.size = size
        self.fp8 = fp8
        self._reduce_in_fp32 = reduce_in_fp32

    @classmethod
    def create(
        cls,
        weight: Tensor,
        labels: Tensor,
        *,
        tp_group: dist.ProcessGroup | None,
        temperature: float,
        vocab_size: int | None,
        active_rows: Tensor | None,
        sequence_parallel: bool,
        block_size: int | None,
        fp8_gradients: bool,
        reduce_in_fp32: bool,
    ) -> LogitBlocks:
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size must be at least 1 row, got {block_size}; None picks one")
        shard = VocabShard.create(len(weight), tp_group=tp_group, vocab_size=vocab_size)
        check_first_call(shard, labels, weight, names_vocab_size=vocab_size is not None)
        route = RowRoute.create(
            labels.numel(), active_rows, tp_group=tp_group, sequence_parallel=sequence_parallel, device=labels.device
        )
        projected = route.take(labels.reshape(-1))
        shard.check_labels(projected)
        size = block_size or default_block_size(len(weight), weight.device)
        if fp8_gradients:
            Fp8Products.check(weight)
        fp8 = Fp8Products(weight) if fp8_gradients and torch.is_grad_enabled() else None  # none to score only
        return cls(
            shard=shard, route=route, labels=projected, shape=labels.shape, temperature=temperature, size=size, fp8=fp8,
            reduce_in_fp32=reduce_in_fp32,
        )  # fmt: skip

    def __call__(self, x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Scratch]]:
        """Place, fp32 logits ``[r, V/TP]`` (valid until the next block) and scratch of every block of ``x [A, H]``."""
        dtype = compute_dtype(weight.dtype)
        rows = min(self.size, len(x))
        buffer = new_block(rows, len(weight), dtype, x.device)
        scratch = Scratch(dtype, x.device)
        for begin in range(0, len(x), self.size):
            at = slice(begin, min(begin + self.size, len(x)))
            yield at, project(x[at], weight, buffer), scratch

    def partials(self, logits: Tensor, at: slice, out: Tensor, scratch: Scratch) -> bool:
        """Statistics of a block of logits; returns what ``write_partials`` returns."""
        return write_partials(logits, self.labels[at], self.shard, self.inverse_temperature, out, scratch)

    def gradient(self, logits: Tensor, at: slice, rule: GradientRule, scratch: Scratch) -> Tensor:
        """Turn a block of logits into its gradient, in place."""
        write_gradient(logits, self.labels[at], self.shard, self.inverse_temperature, rule, logits, scratch)
        return logits

    def new_hidden_gradient(self, x: Tensor) -> Tensor:
        """Uninitialised ``[A, H]`` for this rank's part of d_hidden: fp32 where the parts are to be added in fp32."""
        is_summed = self.shard.size > 1 and self._reduce_in_fp32
        return torch.empty_like(x, dtype=compute_dtype(x.dtype) if is_summed else x.dtype)

    def write_hidden_gradient(self, grad_logits: Tensor, weight: Tensor, out: Tensor) -> None:
        """``out = [r, V/TP] @ [V/TP, H]``"""
        if self.fp8 is None:
            out.copy_(hidden_gradient(grad_logits, weight, out.dtype))
        else:
            out.copy_(self.fp8.hidden_gradient(grad_logits))

    def accumulate_weight_gradient(self, grad_logits: Tensor, x: Tensor, total: Tensor) -> None:
        """``total += grad_logits^T @ x``"""
        accumulate = accumulate_weight_gradient if self.fp8 is None else self.fp8.accumulate_weight_gradient
        accumulate(grad_logits, x, total)

    def to_caller(self, values: Tensor) -> Tensor:
        """``[A]`` -> the shape of the caller's labels, a tensor of its own."""
        return self.route.spread(values).view(self.shape).clone()


class WeightGradient:
    """Where d_weight is summed: an fp32 buffer of ours, or the weight's ``main_grad`` under Megatron's contract."""

    def __init__(self, weight: Tensor, main_grad_owner: Tensor | None) -> None:
        self._weight, self._owner = weight, main_grad_owner
        self.total: Tensor = (
            torch.zeros(weight.shape, dtype=compute_dtype(weight.dtype), device=weight.device)
            if main_grad_owner is None
            else main_grad_owner.main_grad  # type: ignore[attr-defined]
        )

    def finish(self) -> Tensor | None:
        """What autograd gets for the weight."""
        if self._owner is None:
            return self.total.to(self._weight.dtype)
        if not hasattr(self._owner, "grad_added_to_main_grad"):
            return None
        self._owner.grad_added_to_main_grad = True
        return torch.zeros_like(self._weight)

    @staticmethod
    def check_main_grad(weight: Tensor) -> None:
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None:
            raise ValueError(
                "weight.main_grad is missing: wrap the model in Megatron's DDP, or do not ask for the fusion"
            )
        if main_grad.dtype != compute_dtype(weight.dtype) or main_grad.shape != weight.shape:
            raise ValueError(
                f"weight.main_grad must be {compute_dtype(weight.dtype)} {list(weight.shape)}, got {main_grad.dtype} "
                f"{list(main_grad.shape)}: sums over blocks need fp32 (Megatron: accumulate_allreduce_grads_in_fp32)"
            )


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        blocks: LogitBlocks,
        main_grad_owner: Tensor | None,
        with_collision: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x = blocks.route.gather(hidden.reshape(-1, hidden.shape[-1]))
        partials = torch.empty(
            5 if with_collision else 4, len(x), dtype=compute_dtype(weight.dtype), device=hidden.device
        )
        is_finite = True
        for at, logits, scratch in blocks(x, weight):
            is_finite &= blocks.partials(logits, at, partials[:, at], scratch)
        stats = fold_partials(blocks.shard.all_gather(partials), blocks.inverse_temperature)
        ctx.save_for_backward(hidden, weight, stats.max_logit, stats.log_sum, stats.entropy)
        ctx.blocks, ctx.main_grad_owner, ctx.is_finite = blocks, main_grad_owner, is_finite
        ctx.set_materialize_grads(False)
        collision = None if stats.collision is None else blocks.to_caller(stats.collision)
        if collision is not None:
            ctx.mark_non_differentiable(collision)
        return blocks.to_caller(stats.log_probs), blocks.to_caller(stats.entropy), collision

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_order("linear_log_probs_and_entropy")
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, None, None
        hidden, weight, max_logit, log_sum, entropy = ctx.saved_tensors
        blocks: LogitBlocks = ctx.blocks
        take = blocks.route.take
        rule = GradientRule.create(
            max_logit=max_logit,
            log_sum=log_sum,
            entropy=entropy,
            grad_log_probs=torch.zeros_like(entropy) if grad_log_probs is None else take(grad_log_probs.reshape(-1)),
            grad_entropy=None if grad_entropy is None else take(grad_entropy.reshape(-1)),
            inverse_temperature=blocks.inverse_temperature,
            is_finite=ctx.is_finite,
        )
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        flat = hidden.reshape(-1, hidden.shape[-1])
        x = blocks.route.gather(flat)
        grad_x = blocks.new_hidden_gradient(x)
        grad_weight = WeightGradient(weight, ctx.main_grad_owner) if needs_weight else None
        for at, logits, scratch in blocks(x, weight):
            grad_logits = blocks.gradient(logits, at, rule[at], scratch)
            if needs_hidden:
                blocks.write_hidden_gradient(grad_logits, weight, grad_x[at])
            if grad_weight is not None:
                blocks.accumulate_weight_gradient(grad_logits, x[at], grad_weight.total)
        grad_hidden = blocks.route.give_back(grad_x, flat).view(hidden.shape) if needs_hidden else None
        return grad_hidden, None if grad_weight is None else grad_weight.finish(), None, None, None


def check_linear_arguments(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, split_over: dist.ProcessGroup | None
) -> None:
    """Raise ValueError where the arguments of a fused head do not fit; ``split_over``: the sequence-parallel group."""
    refuse_distributed(hidden=hidden, weight=weight, labels=labels)
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., H] and weight [V/TP, H], got hidden {list(hidden.shape)} and weight "
            f"{list(weight.shape)}: pass the projection's weight as it is, not transposed"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share a floating dtype, got {hidden.dtype} and {weight.dtype}")
    expected = list(hidden.shape[:-1])
    if split_over is not None:
        expected[0] *= dist.get_world_size(split_over)
    if list(labels.shape) != expected:
        raise ValueError(
            f"labels must be {expected} for hidden {list(hidden.shape)}, got {list(labels.shape)}: labels cover the "
            "whole sequence; with sequence_parallel hidden is this rank's part of the first dimension"
        )
    check_labels_and_temperature(labels, temperature, hidden.device)
