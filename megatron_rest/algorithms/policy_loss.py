"""ResT's clipped policy loss over the label-aligned tokens ``[T]`` of one microbatch.

    l_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),   r = exp(log_prob - old_log_prob)        (Eq. 19; a.4)
          or what else ``loss.function`` makes of r and A (``ratio_losses.py``)
    loss = sum over all microbatches and ranks of c_t l_t, divided once by the global token count

``c_t`` is where the aggregations differ.  With N sequences, M tokens, weights w of sum W (all of the whole optimiser
step):

    sequence_mean   c_t = w_t / T_i * M / N     paper: mean over sequences of the mean over their tokens
    token_mean      c_t = w_t * M / W           one weighted mean over all tokens
    reference_code  weighted mean of *this* microbatch, times its share of sequences; depends on the split, parity only

The denominators are known before the first forward pass (:class:`BatchTotals`), so loss and gradient are the same for
every split into microbatches, data- and context-parallel ranks.  KL and entropy terms use the same aggregation without
weights. Masked positions are selected away, never multiplied: they may hold NaN.

A loop that meets its microbatches one by one does not know the totals.  Without them c_t drops M (sequence_mean:
w_t / T_i, token_mean: w_t, taking weights of mean 1) and ``num_tokens`` counts what the whole has to be divided by:
sequences or tokens.  Megatron sums that over the step and divides once, so the result is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rest.algorithms.importance import rollout_correction
from megatron_rest.algorithms.kl import kl_estimate
from megatron_rest.algorithms.ratio_losses import RatioTerms, find_ratio_loss
from megatron_rest.config import LossAggregation, LossConfig
from megatron_rest.types import LossInputs, LossOutput

__all__ = ["RestPolicyLoss", "rest_policy_loss"]

# The published code adds this to the weight sum of a microbatch.
_REFERENCE_EPSILON = 1e-8

# Whole sequences add up to an integer within float32 rounding of 1 / T_i; a cut one misses by at least 1 / T_i.
_COUNT_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class RestPolicyLoss:
    """:func:`rest_policy_loss` of one configuration, and what a fused head asks of a loss.

    ``is_token_separable``: whether the loss of a token needs no other token.  Then ``token_losses`` of any rows are
    those rows of ``token_losses`` of all, and a head may differentiate block by block.
    """

    config: LossConfig

    def __call__(self, inputs: LossInputs) -> LossOutput:
        return rest_policy_loss(inputs, self.config)

    @property
    def is_token_separable(self) -> bool:
        config = self.config
        needs_sequences = _needs_sequences(config)
        return config.aggregation is not LossAggregation.REFERENCE_CODE and not needs_sequences

    def token_losses(self, inputs: LossInputs) -> Tensor:
        """float32 ``[T]``, the parts of ``loss_sum``; differentiable in log_probs and entropy."""
        _check(inputs, self.config)
        return _token_losses(inputs, self.config)[0]

    def token_terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """What the loss is made of, float32 ``[T]``, detached, 0 where masked.

        ``log_probs``, ``entropy``, ``ratio``, ``policy_loss`` (clipped, times ``tis_weight`` where that is on) and
        ``token_losses`` (the parts of ``loss_sum``).
        """
        _check(inputs, self.config)
        losses, metrics = _token_losses(inputs, self.config)
        entropy = torch.zeros_like(inputs.log_probs) if inputs.entropy is None else inputs.entropy
        names = ("ratio", "policy_loss", "tis_weight")
        terms = {"log_probs": inputs.log_probs, "entropy": entropy, "token_losses": losses}
        terms |= {name: metrics[name] for name in names if name in metrics}
        return {name: torch.where(inputs.loss_mask, value.detach(), 0.0) for name, value in terms.items()}


def rest_policy_loss(inputs: LossInputs, config: LossConfig) -> LossOutput:
    """Loss of one microbatch as Megatron wants it: a sum, a token count, and metrics as (sum, count).

    Gradient flows into ``inputs.log_probs`` and (entropy bonus only) ``inputs.entropy``; all else is constant, weights
    and importance ratios included.  An empty microbatch gives 0 with a graph, so its backward still joins every
    collective.

    Args:
        inputs: float32 ``[T]`` tensors; ``totals`` of the whole optimiser step, or None where they are not known.
        config: clipping, aggregation and optional terms.

    Returns:
        ``loss_sum`` (scalar; divide the sum over everything by the sum of ``num_tokens``, which is
        ``totals.num_tokens``), ``num_tokens`` (int64 scalar; without totals and with sequence_mean it counts sequences)
        and detached, unweighted metrics.  ``clip_fraction`` counts tokens where the clipped side is the larger loss,
        of which ``clip_fraction_high`` / ``_low`` are those above / below the range; ``dual_clip_fraction`` those
        bounded by ``-c A``.

    Raises:
        ValueError: a shape that is not ``[T]``, a mask that is not bool, an input that the configuration needs and
            lacks, or no totals where a sequence is cut (on CUDA this one is a device-side assertion).
    """
    _check(inputs, config)
    losses, metrics = _token_losses(inputs, config)
    mask = inputs.loss_mask
    num_tokens = mask.sum()
    sums = {name: (torch.where(mask, value, 0.0).sum(), num_tokens) for name, value in metrics.items()}
    counts_sequences = inputs.totals is None and config.aggregation is LossAggregation.SEQUENCE_MEAN
    return LossOutput(
        loss_sum=losses.sum(), num_tokens=_num_sequences(inputs) if counts_sequences else num_tokens, metrics=sums
    )


def _token_losses(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Aggregated loss ``[T]`` (its sum is the loss) and detached metrics ``[T]`` of checked inputs."""
    mask = inputs.loss_mask
    log_probs = torch.where(mask, inputs.log_probs, 0.0)
    old = inputs.log_probs if inputs.old_log_probs is None else inputs.old_log_probs
    old_log_probs = torch.where(mask, old.detach(), 0.0)
    advantages = torch.where(mask, inputs.advantages.detach(), 0.0)
    log_ratio = (log_probs - old_log_probs).clamp(-config.max_log_ratio, config.max_log_ratio)
    token_loss, metrics = find_ratio_loss(config).function(
        RatioTerms(
            log_probs=log_probs,
            log_ratio=log_ratio,
            advantages=advantages,
            mask=mask,
            sequence_ids=inputs.sequence_ids,
            sequence_lengths=torch.where(mask, inputs.sequence_lengths, 1.0),
            config=config,
        )
    )
    if config.tis_cap is not None:
        correction = rollout_correction(inputs, old_log_probs, config)
        token_loss = token_loss * correction
        metrics["tis_weight"] = correction
    weights = None if inputs.token_weights is None else torch.where(mask, inputs.token_weights.detach(), 0.0)
    aggregate = _Aggregation.of(inputs, config)
    losses = aggregate(token_loss, weights)
    metrics["policy_loss"] = token_loss.detach()
    if config.kl_coef:
        assert inputs.ref_log_probs is not None  # checked at the door
        ref_log_probs = torch.where(mask, inputs.ref_log_probs.detach(), 0.0)
        kl = kl_estimate(log_probs, ref_log_probs, estimator=config.kl_estimator, max_log_ratio=config.max_log_ratio)
        losses = losses + config.kl_coef * aggregate(kl, None)
        metrics["kl_ref"] = kl.detach()
    if inputs.entropy is not None:
        entropy = torch.where(mask, inputs.entropy, 0.0)
        metrics["entropy"] = entropy.detach()
        if config.entropy_coef:
            losses = losses - config.entropy_coef * aggregate(entropy, None)
    return losses, metrics


def _num_sequences(inputs: LossInputs) -> Tensor:
    """Sequences with loss tokens in this microbatch, int64; every one of them must be whole."""
    total = _inverse_lengths(inputs).double().sum()
    count = total.round()
    message = (
        "a sequence is cut: without LossInputs.totals the sequences of a microbatch are counted, so all their loss "
        "tokens must be in it; pass the totals of the whole step (context parallelism needs them)"
    )
    is_whole = (total - count).abs() < _COUNT_TOLERANCE
    if is_whole.device.type != "cpu":
        torch._assert_async(is_whole, message)
    elif not bool(is_whole):
        raise ValueError(f"{message}; counted {float(total):.4f}")
    return count.long()


def _inverse_lengths(inputs: LossInputs) -> Tensor:
    """1 / T_i of each token's sequence ``[T]``, 0 where there is no loss."""
    mask = inputs.loss_mask
    return torch.where(mask, 1.0 / torch.where(mask, inputs.sequence_lengths, 1.0), 0.0)


def _needs_sequences(config: LossConfig) -> bool:
    """Whether the loss of a token depends on other tokens of its sequence."""
    is_whole = config.tis_cap is not None and config.tis_level == "sequence"
    return is_whole or find_ratio_loss(config).needs_sequences


@dataclass(frozen=True, slots=True)
class _Aggregation:
    """Token values ``[T]`` -> their parts of ``M * loss`` ``[T]`` (without totals, of N or M times the loss)."""

    mask: Tensor
    coefficient: Tensor | float  # of each token's value, before weights
    weighted_scale: float  # token_mean only: M / W
    share: Tensor | None  # reference_code only: M x this microbatch's share of the sequences

    @classmethod
    def of(cls, inputs: LossInputs, config: LossConfig) -> _Aggregation:
        totals, kind = inputs.totals, config.aggregation
        coefficient: Tensor | float = 1.0
        weighted_scale, share = 1.0, None
        if kind is LossAggregation.SEQUENCE_MEAN:
            factor = 1.0 if totals is None else _ratio(totals.num_tokens, totals.num_sequences)
            coefficient = _inverse_lengths(inputs) * factor
        elif kind is LossAggregation.TOKEN_MEAN:
            weighted_scale = 1.0 if totals is None else _ratio(totals.num_tokens, totals.weight_sum)
        else:
            assert totals is not None  # checked at the door
            share = _inverse_lengths(inputs).sum() / totals.num_sequences * totals.num_tokens
        return cls(mask=inputs.loss_mask, coefficient=coefficient, weighted_scale=weighted_scale, share=share)

    def __call__(self, values: Tensor, weights: Tensor | None) -> Tensor:
        values = torch.where(self.mask, values, 0.0) * self.coefficient
        if weights is not None:
            values = values * weights * self.weighted_scale
        if self.share is None:
            return values
        denominator = self.mask.sum() if weights is None else weights.sum()
        return values / (denominator + _REFERENCE_EPSILON) * self.share


def _ratio(numerator: float, denominator: float) -> float:
    """0 where there is nothing to divide."""
    return numerator / denominator if denominator else 0.0


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
        "sequence_ids": _needs_sequences(config),
    }
    needed["totals"] = config.aggregation is LossAggregation.REFERENCE_CODE
    missing = [name for name, is_needed in needed.items() if is_needed and getattr(inputs, name) is None]
    if missing:
        raise ValueError(f"this loss configuration needs {', '.join(missing)} in LossInputs, but got None")
