"""Group-relative advantages: a rollout is as good as it beats its siblings of the same prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rest.config import AdvantageEstimator

__all__ = ["group_relative_advantages"]


def group_relative_advantages(
    rewards: Any,
    *,
    estimator: AdvantageEstimator | str = AdvantageEstimator.GRPO,
    epsilon: float = 1e-6,
) -> Any:
    """Advantage of each rollout within its group; every token of the rollout gets this one number.

    ``grpo`` (paper Eq. 15): ``(R - mean) / (std + epsilon)`` with the unbiased standard deviation (n - 1), as the
    published code has it.  ``dr_grpo`` (arXiv 2503.20783): ``R - mean``.  ``rloo`` (arXiv 2402.14740): ``R - mean`` of
    the others, which is ``n / (n - 1)`` times that.  A group of equal rewards gives exactly 0.  A group of one has no
    siblings: mean 0 and std 1, so the advantage is the reward itself (published code).

    Args:
        rewards: ``[G]`` one group, or ``[P, G]`` one group a row; torch, numpy or nested lists.
        estimator: ``grpo``, ``dr_grpo`` or ``rloo``.
        epsilon: added to the standard deviation.

    Returns:
        Same shape and kind as ``rewards`` (lists become numpy), in its floating dtype (float64 for integers and lists).

    Raises:
        ValueError: another number of dimensions, an empty group, a reward that is not finite, an unknown estimator.
    """
    estimator = AdvantageEstimator(estimator)
    values = torch.as_tensor(rewards, dtype=torch.float64)
    if values.ndim not in (1, 2) or values.numel() == 0:
        raise ValueError(f"rewards have shape {tuple(values.shape)}, expected [G] or [P, G] with at least one rollout")
    if not torch.isfinite(values).all():
        raise ValueError("a reward is not finite: one NaN would spread over its whole group")
    advantages = _advantages(values, estimator, epsilon)
    if isinstance(rewards, Tensor):
        return advantages.to(rewards.dtype) if rewards.is_floating_point() else advantages
    dtype = getattr(rewards, "dtype", None)
    return advantages.numpy().astype(dtype if dtype is not None and dtype.kind == "f" else "float64", copy=False)


def _advantages(values: Tensor, estimator: AdvantageEstimator, epsilon: float) -> Tensor:
    if values.shape[-1] == 1:
        return values / (1.0 + epsilon) if estimator is AdvantageEstimator.GRPO else values.clone()
    is_constant = values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)
    centred = torch.where(is_constant, 0.0, values - values.mean(-1, keepdim=True))  # rounding of the mean is no signal
    if estimator is AdvantageEstimator.DR_GRPO:
        return centred
    if estimator is AdvantageEstimator.RLOO:
        return centred * (values.shape[-1] / (values.shape[-1] - 1))
    return centred / (values.std(-1, keepdim=True) + epsilon)
