"""Policy loss and its gradient in one sweep over the rows: three matrix products instead of four.

The gradient of a token's loss in its logits needs g = dl/dlog_prob and h = dl/dentropy of that token, and both are
known as soon as its own row is reduced.  So each block of logits is projected once, reduced, joined over the ranks (one
all-gather a block), turned into its gradient in place, and multiplied into d_hidden and d_weight, all in the forward
pass.  The backward pass scales what is there by the incoming gradient of the scalar.

This works where the loss of a token depends on that token alone (PPO clipping, token weights, truncated importance
sampling, entropy bonus).  A ratio over a whole sequence is not known before its last row: use
``linear_log_probs_and_entropy`` there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.ops.fused_linear import LogitBlocks, WeightGradient, check_linear_arguments
from megatron_rest.ops.row_statistics import GradientRule, compute_dtype, fold_partials
from megatron_rest.ops.vocab_parallel import refuse_second_order

__all__ = ["ClippedTokenLoss", "PolicyStep", "TokenLoss", "policy_step"]

# (log_probs [r], entropy [r], rows) -> loss of each row [r].  ``rows``, a slice or int64 [r], are places among the
# flattened tokens.  It must treat rows independently and be differentiable in its first two arguments.
TokenLoss = Callable[[Tensor, Tensor, Tensor | slice], Tensor]


class PolicyStep(NamedTuple):
    """Results of one sweep; rows that are not projected read 0."""

    loss_sum: Tensor  # scalar fp32, sum of the token losses over the projected rows; carries the gradient
    log_probs: Tensor  # [...], nats, constant
    entropy: Tensor  # [...], nats, constant


@dataclass(frozen=True, kw_only=True, slots=True)
class ClippedTokenLoss:
    """Weighted clipped loss of each token, with dual clip and entropy bonus:

        l_t = weights_t max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) - entropy_weights_t H_t
        r = exp(log_prob - old_log_prob);  where A < 0 the max is bounded by -dual_clip A

    (PPO, arXiv 1707.06347; asymmetric clip, arXiv 2503.14476; dual clip, arXiv 1912.09729.)

    ``weights`` hold every constant factor of a token: loss mask, region weight, truncated importance weight and the
    denominators of the aggregation; ``entropy_weights`` likewise the entropy coefficient.  All tensors have one entry a
    token, in the flattened order of the labels.  Where ``weights`` is zero the other entries may hold anything.
    """

    old_log_probs: Tensor  # [n]
    advantages: Tensor  # [n]
    weights: Tensor  # [n]
    entropy_weights: Tensor | None = None  # [n]; None = no entropy term, and none is differentiated
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    max_log_ratio: float = 20.0  # beyond it the ratio is constant: e^20 is as good as infinite, and infinity is not

    def __call__(self, log_probs: Tensor, entropy: Tensor, rows: Tensor | slice) -> Tensor:
        """Loss ``[r]`` of the given rows."""
        weights = self.weights[rows]
        has_loss = weights != 0  # selects, and never multiplies: what it leaves out may be NaN
        advantages = torch.where(has_loss, self.advantages[rows], 0.0)
        log_ratio = torch.where(has_loss, log_probs - self.old_log_probs[rows], 0.0)
        ratio = log_ratio.clamp(-self.max_log_ratio, self.max_log_ratio).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high))
        if self.dual_clip is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -self.dual_clip * advantages), loss)
        loss = torch.where(has_loss, weights * loss, 0.0)
        if self.entropy_weights is None:
            return loss
        entropy_weights = self.entropy_weights[rows]
        return loss - entropy_weights * torch.where(entropy_weights != 0, entropy, 0.0)


def policy_step(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    active_rows: Tensor | None = None,
    block_size: int | None = None,
    main_grad_scale: float | None = None,
    fp8_gradients: bool = False,
    reduce_in_fp32: bool = True,
) -> PolicyStep:
    """Sum of ``token_loss`` over the rows, differentiable once in ``hidden`` and ``weight``.

    Collectives over ``tp_group``, all in the forward pass: one all-gather of 16 bytes a row and rank for every block,
    and one all-reduce of d_hidden; with ``sequence_parallel`` an all-gather of the rows and a reduce-scatter instead.
    None in the backward pass.  Without gradient (``torch.no_grad``) only the scoring half runs.

    Args:
        hidden, weight, labels, tp_group, temperature, vocab_size, sequence_parallel, active_rows, block_size,
            fp8_gradients, reduce_in_fp32: as in ``linear_log_probs_and_entropy``.
        token_loss: loss of each row from its own log-prob and entropy, e.g. :class:`ClippedTokenLoss`.
        main_grad_scale: None sums d_weight in fp32 and returns it through autograd.  A number is a promise that the
            gradient of ``loss_sum`` will be that constant (for Megatron: loss scale / denominator): d_weight then goes,
            scaled, straight into ``weight.main_grad`` in this forward pass, and no vocabulary-sized buffer exists.  The
            backward pass checks the promise (RuntimeError; on CUDA a device-side assertion), and
            ``weight.grad_added_to_main_grad`` follows Megatron's contract of gradient accumulation fusion.

    Raises:
        ValueError: shapes, dtypes, options or labels do not fit.
        RuntimeError: ``fp8_gradients`` where the hardware or the torch release has no such products.
    """
    check_linear_arguments(hidden, weight, labels, temperature, tp_group if sequence_parallel else None)
    if main_grad_scale is not None:
        WeightGradient.check_main_grad(weight)
    blocks = LogitBlocks.create(
        weight, labels, tp_group=tp_group, temperature=temperature, vocab_size=vocab_size, active_rows=active_rows,
        sequence_parallel=sequence_parallel, block_size=block_size, fp8_gradients=fp8_gradients,
        reduce_in_fp32=reduce_in_fp32,
    )  # fmt: skip
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return PolicyStep(*_PolicyStep.apply(hidden, weight, blocks, token_loss, main_grad_scale, wants_grad))


class _PolicyStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        blocks: LogitBlocks,
        token_loss: TokenLoss,
        main_grad_scale: float | None,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        sweep = _Sweep(blocks.route.gather(flat), weight, blocks, token_loss)
        needs_hidden, needs_weight = (wants_grad and needed for needed in ctx.needs_input_grad[:2])
        owner = weight if main_grad_scale is not None else None
        grad_weight = WeightGradient(weight, owner) if needs_weight else None
        grad_x = sweep.run(needs_hidden, grad_weight, 1.0 if main_grad_scale is None else main_grad_scale)
        ctx.grad_hidden = None if grad_x is None else blocks.route.give_back(grad_x, flat).view(hidden.shape)
        ctx.grad_weight, ctx.main_grad_scale, ctx.is_spent = grad_weight, main_grad_scale, False
        log_probs, entropy = blocks.to_caller(sweep.log_probs), blocks.to_caller(sweep.entropy)
        ctx.mark_non_differentiable(log_probs, entropy)
        return sweep.loss_sum, log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("policy_step")
        if ctx.is_spent:
            raise RuntimeError("second backward pass through policy_step: its gradients were handed out by the first")
        ctx.is_spent = True
        grad_hidden, grad_weight, scale = ctx.grad_hidden, ctx.grad_weight, ctx.main_grad_scale
        ctx.grad_hidden = ctx.grad_weight = None
        if scale is not None:
            _check_promise(grad, scale)
        else:
            for gradient in (grad_hidden, None if grad_weight is None else grad_weight.total):
                if gradient is not None:
                    gradient.mul_(grad)
        return grad_hidden, None if grad_weight is None else grad_weight.finish(), None, None, None, None


class _Sweep:
    """One pass over the blocks: project, reduce, join the ranks, differentiate, multiply back."""

    def __init__(self, x: Tensor, weight: Tensor, blocks: LogitBlocks, token_loss: TokenLoss) -> None:
        self.x, self.weight, self.blocks, self.token_loss = x, weight, blocks, token_loss
        self.dtype = compute_dtype(weight.dtype)
        self.log_probs = torch.empty(len(x), dtype=self.dtype, device=x.device)
        self.entropy = torch.empty_like(self.log_probs)
        self.loss_sum = torch.zeros((), dtype=self.dtype, device=x.device)

    def run(self, needs_hidden: bool, grad_weight: WeightGradient | None, scale: float) -> Tensor | None:
        """Fill the results; gradients are those of ``scale * loss_sum``."""
        grad_x = self.blocks.new_hidden_gradient(self.x) if needs_hidden else None
        for at, logits, scratch in self.blocks(self.x, self.weight):
            partials = torch.empty(4, len(logits), dtype=self.dtype, device=logits.device)
            is_finite = self.blocks.partials(logits, at, partials, scratch)
            stats = fold_partials(self.blocks.shard.all_gather(partials), self.blocks.inverse_temperature)
            self.log_probs[at], self.entropy[at] = stats.log_probs, stats.entropy
            if grad_x is None and grad_weight is None:
                self.loss_sum += self._losses(at, self.log_probs[at], self.entropy[at]).sum()
                continue
            g, h = self._differentiate(at)
            rule = GradientRule.create(
                max_logit=stats.max_logit,
                log_sum=stats.log_sum,
                entropy=stats.entropy,
                grad_log_probs=g * scale,
                grad_entropy=None if h is None else h * scale,
                inverse_temperature=self.blocks.inverse_temperature,
                is_finite=is_finite,
            )
            grad_logits = self.blocks.gradient(logits, at, rule, scratch)
            if grad_x is not None:
                self.blocks.write_hidden_gradient(grad_logits, self.weight, grad_x[at])
            if grad_weight is not None:
                self.blocks.accumulate_weight_gradient(grad_logits, self.x[at], grad_weight.total)
        return grad_x

    def _losses(self, at: slice, log_probs: Tensor, entropy: Tensor) -> Tensor:
        active = self.blocks.route.active
        losses = self.token_loss(log_probs, entropy, at if active is None else active[at])
        if losses.shape != log_probs.shape:
            raise ValueError(
                f"token_loss must return one loss a row, {list(log_probs.shape)}, got {list(losses.shape)}: the sum "
                "over rows is taken here"
            )
        return losses

    def _differentiate(self, at: slice) -> tuple[Tensor, Tensor | None]:
        """Add the block's losses up; return dl/dlog_probs and dl/dentropy (None where the loss has no such term)."""
        with torch.enable_grad():
            log_probs = self.log_probs[at].detach().requires_grad_()
            entropy = self.entropy[at].detach().requires_grad_()
            losses = self._losses(at, log_probs, entropy)
            g, h = torch.autograd.grad(losses.sum(), (log_probs, entropy), allow_unused=True)
        self.loss_sum += losses.detach().sum()
        return torch.zeros_like(log_probs) if g is None else g, h


def _check_promise(grad: Tensor, scale: float) -> None:
    message = (
        f"policy_step was told main_grad_scale={scale}, but loss_sum received another gradient; main_grad already "
        "holds the promised one: pass the constant that the loss is really multiplied by"
    )
    is_kept = (grad.double() - scale).abs() <= 1e-6 * abs(scale)
    if grad.device.type != "cpu":
        torch._assert_async(is_kept, message)
    elif not bool(is_kept):
        raise RuntimeError(f"{message} (got {float(grad)})")
