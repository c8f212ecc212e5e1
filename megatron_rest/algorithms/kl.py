"""Per-token estimates of KL(policy || reference) from tokens sampled by the policy (J. Schulman, "Approximating KL
divergence").

d = log pi - log pi_ref
k1 = d                  unbiased value; its gradient has mean 0, so as a loss term it only adds noise
k2 = d^2 / 2            biased value; its gradient is the on-policy gradient of the KL
k3 = exp(-d) - 1 + d    unbiased, non-negative value; its gradient is that of KL(reference || policy)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kl_estimate"]


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, *, estimator: str, max_log_ratio: float = 20.0) -> Tensor:
    """Estimate per token, nats, same shape; gradient flows into ``log_probs``.

    ``max_log_ratio`` clamps ``d`` before the exponential of k3.  Raises ValueError on an unknown estimator.
    """
    difference = log_probs - ref_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        clamped = difference.clamp(-max_log_ratio, max_log_ratio)
        return torch.expm1(-clamped) + clamped
    raise ValueError(f"KL estimator is {estimator!r}, expected k1, k2 or k3")
