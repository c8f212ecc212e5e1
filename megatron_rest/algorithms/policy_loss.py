"""ResT's clipped policy loss over the label-aligned tokens ``[T]`` of one microbatch.

    l_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),   r = exp(log_prob - old_log_prob)        (Eq. 19; a.4)
    loss = sum over all microbatches and ranks of c_t l_t, divided once by the global token count

``c_t`` is where the aggregations differ.  With N sequences, M tokens, weights w of sum W (all of the whole optimiser
step):

    sequence_mean   c_t = w_t / T_i * M / N     paper: mean over sequences of the mean over their tokens
    token_mean      c_t = w_t * M / W           one weighted mean over all tokens
    reference_code  weighted mean of *this* microbatch, times its share of sequences; depends on the split, parity only

The denominators are known before the first forward pass (:class:`BatchTotals`), so loss and gradient are the same for
every split into microbatches, data- and context-parallel ranks.  KL and entropy terms use the same aggregation without
weights. Masked positions are selected away, never multiplied: they may hold NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rest.algorithms.importance import rollout_correction
from megatron_rest.algorithms.kl import kl_estimate
from megatron_rest.config import LossAggregation, LossConfig
from megatron_rest.types import LossInputs, LossOutput

__all__ = ["rest_policy_loss"]

# The published code adds this to the weight sum of a microbatch.
_REFERENCE_EPSILON = 1e-8


def rest_policy_loss(inputs: LossInputs, config: LossConfig) -> LossOutput:
    """Loss of one microbatch as Megatron wants it: a sum, a token count, and metrics as (sum, count).

    Gradient flows into ``inputs.log_probs`` and (entropy bonus only) ``inputs.entropy``; all else is constant, weights
    and importance ratios included.  An empty microbatch gives 0 with a graph, so its backward still joins every
    collective.

    Args:
        inputs: float32 ``[T]`` tensors; ``totals`` of the whole optimiser step.
        config: clipping, aggregation and optional terms.

    Returns:
        ``loss_sum`` (scalar; divide the sum over everything by ``totals.num_tokens``), ``num_tokens`` (int64 scalar)
        and detached, unweighted metrics.  ``clip_fraction`` counts tokens where the clipped side is the larger loss,
        of which ``clip_fraction_high`` / ``_low`` are those above / below the range; ``dual_clip_fraction`` those
        bounded by ``-c A``.

    Raises:
        ValueError: a shape that is not ``[T]``, a mask that is not bool, or an input that the configuration needs and
            lacks.
    """
    _check(inputs, config)
    mask = inputs.loss_mask
    log_probs = torch.where(mask, inputs.log_probs, 0.0)
    old_log_probs = torch.where(mask, inputs.old_log_probs.detach(), 0.0)
    advantages = torch.where(mask, inputs.advantages.detach(), 0.0)
    token_loss, metrics = _clipped_loss(log_probs, old_log_probs, advantages, mask, config)
    if config.tis_cap is not None:
        correction = rollout_correction(inputs, old_log_probs, config)
        token_loss = token_loss * correction
        metrics["tis_weight"] = correction
    weights = None if inputs.token_weights is None else torch.where(mask, inputs.token_weights.detach(), 0.0)
    aggregate = _Aggregation.of(inputs, config)
    loss_sum = aggregate(token_loss, weights)
    metrics["policy_loss"] = token_loss.detach()
    if config.kl_coef:
        assert inputs.ref_log_probs is not None  # checked at the door
        ref_log_probs = torch.where(mask, inputs.ref_log_probs.detach(), 0.0)
        kl = kl_estimate(log_probs, ref_log_probs, estimator=config.kl_estimator, max_log_ratio=config.max_log_ratio)
        loss_sum = loss_sum + config.kl_coef * aggregate(kl, None)
        metrics["kl_ref"] = kl.detach()
    if inputs.entropy is not None:
        entropy = torch.where(mask, inputs.entropy, 0.0)
        metrics["entropy"] = entropy.detach()
        if config.entropy_coef:
            loss_sum = loss_sum - config.entropy_coef * aggregate(entropy, None)
    num_tokens = mask.sum()
    sums = {name: (torch.where(mask, value, 0.0).sum(), num_tokens) for name, value in metrics.items()}
    return LossOutput(loss_sum=loss_sum, num_tokens=num_tokens, metrics=sums)


def _clipped_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token losses ``[T]`` and per-token metrics.  With ``log_probs == old_log_probs`` the ratio is exactly 1."""
    log_ratio = (log_probs - old_log_probs).clamp(-config.max_log_ratio, config.max_log_ratio)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    token_loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    seen, seen_ratio = log_ratio.detach(), ratio.detach()
    metrics = {
        "ratio": seen_ratio,
        "approx_kl": torch.expm1(seen) - seen,  # k3 of KL(old || new) on samples of old: non-negative, unbiased
        "clip_fraction": is_clipped.float(),
        "clip_fraction_high": (is_clipped & (seen_ratio > 1.0)).float(),
        "clip_fraction_low": (is_clipped & (seen_ratio < 1.0)).float(),
    }
    if config.dual_clip is not None:  # for A < 0 the clipped loss is unbounded in r
        bound = -config.dual_clip * advantages
        is_bounded = (advantages < 0) & (token_loss > bound)
        token_loss = torch.where(is_bounded, bound, token_loss)
        metrics["dual_clip_fraction"] = is_bounded.float()
    return token_loss, metrics


@dataclass(frozen=True, slots=True)
class _Aggregation:
    """Token values ``[T]`` -> this microbatch's part of ``M * loss``."""

    mask: Tensor
    per_token: Tensor | None  # 1 / T_i, sequence_mean only
    share: Tensor | None  # this microbatch's share of the sequences, reference_code only
    num_tokens: float
    factor: float  # M / N for sequence_mean
    weight_sum: float

    @classmethod
    def of(cls, inputs: LossInputs, config: LossConfig) -> _Aggregation:
        totals, mask = inputs.totals, inputs.loss_mask
        kind = config.aggregation
        inverse = None
        if kind is not LossAggregation.TOKEN_MEAN:
            inverse = torch.where(mask, 1.0 / torch.where(mask, inputs.sequence_lengths, 1.0), 0.0)
        is_reference = kind is LossAggregation.REFERENCE_CODE
        return cls(
            mask=mask,
            per_token=None if is_reference else inverse,
            share=inverse.sum() / totals.num_sequences if is_reference and inverse is not None else None,
            num_tokens=totals.num_tokens,
            factor=totals.num_tokens / totals.num_sequences if totals.num_sequences else 0.0,
            weight_sum=totals.weight_sum,
        )

    def __call__(self, values: Tensor, weights: Tensor | None) -> Tensor:
        values = torch.where(self.mask, values, 0.0)
        weighted = values if weights is None else values * weights
        if self.share is not None:
            denominator = self.mask.sum() if weights is None else weights.sum()
            return weighted.sum() / (denominator + _REFERENCE_EPSILON) * self.share * self.num_tokens
        if self.per_token is not None:
            return (weighted * self.per_token).sum() * self.factor
        scale = 1.0 if weights is None else (self.num_tokens / self.weight_sum if self.weight_sum else 0.0)
        return weighted.sum() * scale


def _check(inputs: LossInputs, config: LossConfig) -> None:
    shape = inputs.log_probs.shape
    if len(shape) != 1:
        raise ValueError(f"log_probs has shape {tuple(shape)}, expected [T]: pack the sequences of a microbatch")
    if inputs.loss_mask.dtype != torch.bool:
        raise ValueError(
            f"loss_mask is {inputs.loss_mask.dtype}, expected torch.bool: it selects, it is not multiplied"
        )
    for name in (
        "old_log_probs", "advantages", "loss_mask", "sequence_lengths", "entropy", "token_weights",
        "rollout_log_probs", "ref_log_probs", "sequence_ids",
    ):  # fmt: skip
        value = getattr(inputs, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)} like log_probs")
    needed = {
        "ref_log_probs": bool(config.kl_coef),
        "entropy": bool(config.entropy_coef),
        "rollout_log_probs": config.tis_cap is not None,
        "sequence_ids": config.tis_cap is not None and config.tis_level == "sequence",
    }
    missing = [name for name, is_needed in needed.items() if is_needed and getattr(inputs, name) is None]
    if missing:
        raise ValueError(f"this loss configuration needs {', '.join(missing)} in LossInputs, but got None")
