"""``loss.function``: what the ratio of a token, r = exp(log pi - log pi_old), and its advantage A make of a loss.

| name | token loss | source |
| --- | --- | --- |
| clipped | max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), dual clip | PPO 1707.06347, clip-higher 2503.14476 |
| gspo | the same with s in the place of r: s_i = exp(mean over the answer of log r), by its token form | 2507.18071 |
| cispo | -A sg(clip(r, 1 - clip_low, 1 + clip_high)) log pi: no token loses its gradient | MiniMax-M1, 2506.13585 |
| sapo | -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A (1.0 and 1.05) | 2511.20347 |

Aggregation, token weights, importance correction, KL and entropy terms are around them and the same for all.  gspo's
clip ranges are of answers, hundreds of times narrower than those of tokens (paper: 3e-4 and 4e-4).  The value of a
cispo loss means nothing; its gradient is what is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_rest.algorithms.importance import sum_over_sequence
from megatron_rest.config import ConfigError, LossConfig
from megatron_rest.user_code import make

__all__ = ["RatioLoss", "RatioTerms", "find_ratio_loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioTerms:
    """Label-aligned ``[T]`` tokens of a microbatch; everything is 0 where masked, ``log_probs`` alone has gradient."""

    log_probs: Tensor
    log_ratio: Tensor  # clamped to +- loss.max_log_ratio; exactly 0 where nothing has moved
    advantages: Tensor
    mask: Tensor  # bool
    sequence_ids: Tensor | None  # int64; where the loss says that it needs them
    sequence_lengths: Tensor
    config: LossConfig


TokenTerms = tuple[Tensor, dict[str, Tensor]]
"""Token losses ``[T]``, differentiable in ``log_probs``, and detached metrics ``[T]``."""


@dataclass(frozen=True, slots=True)
class RatioLoss:
    """One of them.  Code of the user's own is a factory: ``factory(**loss.options) -> RatioLoss``."""

    function: Callable[[RatioTerms], TokenTerms]
    needs_sequences: bool = (
        False  # a token's loss depends on others of its answer: a head cannot differentiate it alone
    )


def find_ratio_loss(config: LossConfig) -> RatioLoss:
    """What ``loss.function`` names.  Raises ConfigError: options that it does not take, or no RatioLoss."""
    return _find(config.function, json.dumps(config.options, sort_keys=True))


@cache  # a head asks for every block of rows
def _find(name: str, options_text: str) -> RatioLoss:
    options: dict[str, Any] = json.loads(options_text)
    if ":" in name:
        loss = make("loss.function", name, options, "loss.options")
        if not isinstance(loss, RatioLoss):
            raise ConfigError(
                f"loss.function {name!r} makes a {type(loss).__name__}, expected "
                "megatron_rest.algorithms.RatioLoss(function, needs_sequences=...)"
            )
        return loss
    if name == "sapo":
        unknown = sorted(set(options) - {"tau_positive", "tau_negative"})
        taus = {"tau_positive": 1.0, "tau_negative": 1.05} | options
        if unknown or not all(isinstance(tau, int | float) and tau > 0 for tau in taus.values()):
            raise ConfigError(f"loss.options {options}: loss.function=sapo takes tau_positive, tau_negative > 0")
        return RatioLoss(lambda terms: _sapo(terms, **taus))
    if options:
        raise ConfigError(f"loss.options {', '.join(options)}: loss.function={name} takes none")
    return {"clipped": RatioLoss(clipped), "gspo": RatioLoss(_gspo, True), "cispo": RatioLoss(_cispo)}[name]


def clipped(terms: RatioTerms) -> TokenTerms:
    """PPO's loss.  With ``log_probs == old_log_probs`` the ratio is exactly 1."""
    return _clip(terms, terms.log_ratio)


def _gspo(terms: RatioTerms) -> TokenTerms:
    assert terms.sequence_ids is not None  # checked by the loss
    whole = sum_over_sequence(terms.log_ratio.detach(), terms.mask, terms.sequence_ids, terms.sequence_lengths)
    mean = torch.where(terms.mask, whole / terms.sequence_lengths, 0.0)
    # The value is the answer's, the gradient each token's own: 1 / T_i of it comes with the aggregation.
    return _clip(terms, mean + terms.log_ratio - terms.log_ratio.detach())


def _clip(terms: RatioTerms, log_ratio: Tensor) -> TokenTerms:
    config, advantages = terms.config, terms.advantages
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    token_loss = torch.maximum(unclipped, clipped)
    metrics = _metrics(log_ratio, clipped > unclipped)
    if config.dual_clip is not None:  # for A < 0 the clipped loss is unbounded in r
        bound = -config.dual_clip * advantages
        is_bounded = (advantages < 0) & (token_loss > bound)
        token_loss = torch.where(is_bounded, bound, token_loss)
        metrics["dual_clip_fraction"] = is_bounded.float()
    return token_loss, metrics


def _cispo(terms: RatioTerms) -> TokenTerms:
    ratio = terms.log_ratio.detach().exp()
    bounded = ratio.clamp(1.0 - terms.config.clip_low, 1.0 + terms.config.clip_high)
    return -terms.advantages * bounded * terms.log_probs, _metrics(terms.log_ratio, bounded != ratio)


def _sapo(terms: RatioTerms, *, tau_positive: float, tau_negative: float) -> TokenTerms:
    ratio = terms.log_ratio.exp()
    tau = torch.where(terms.advantages > 0, ratio.new_tensor(tau_positive), ratio.new_tensor(tau_negative))
    token_loss = -terms.advantages * torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau)
    seen = ratio.detach()
    is_outside = (seen > 1.0 + terms.config.clip_high) | (seen < 1.0 - terms.config.clip_low)
    return token_loss, _metrics(terms.log_ratio, is_outside)


def _metrics(log_ratio: Tensor, is_clipped: Tensor) -> dict[str, Tensor]:
    seen = log_ratio.detach()
    ratio = seen.exp()
    return {
        "ratio": ratio,
        "approx_kl": torch.expm1(seen) - seen,  # k3 of KL(old || new) on samples of old: non-negative, unbiased
        "clip_fraction": is_clipped.float(),
        "clip_fraction_high": (is_clipped & (ratio > 1.0)).float(),
        "clip_fraction_low": (is_clipped & (ratio < 1.0)).float(),
    }
