"""The two theorems as functions: entropy bounds the score, and weights inverse to the bound minimise the variance.

All arrays are float64 numpy, entropies in nats.  Nothing here is differentiable: weights are constants of the loss.
"""

from __future__ import annotations

import numpy as np

__all__ = ["entropy_weights", "score_norm_bound", "variance_optimal_weights"]

# Smallest beta that a weight may divide by: far below any real score norm, above the reciprocal's overflow.
_MIN_BETA = 1e-30


def score_norm_bound(entropy: np.ndarray | float) -> np.ndarray:
    """``1 - exp(-H)`` >= ``E ||e_a - p||^2 = 1 - sum p^2`` (Lemma 2), with equality iff p is uniform on its support."""
    return -np.expm1(-np.asarray(entropy, dtype=np.float64))


def entropy_weights(entropy: np.ndarray, *, rule: str = "score_bound", floor: float = 0.01) -> np.ndarray:
    """Unnormalised weights of mean entropies (Eq. 9): ``1 / (1 - exp(-H))`` or ``1 / H``.

    Args:
        entropy: mean entropy of each region, nats, any shape.
        rule: ``score_bound`` or ``inverse``.
        floor: entropies below it count as it; both rules diverge at 0, where the gradient itself vanishes.

    Raises:
        ValueError: unknown rule, or a floor that is not positive.
    """
    if floor <= 0:
        raise ValueError(f"entropy floor is {floor}, expected a number > 0")
    floored = np.maximum(np.asarray(entropy, dtype=np.float64), floor)
    if rule == "score_bound":
        return 1.0 / score_norm_bound(floored)
    if rule == "inverse":
        return 1.0 / floored
    raise ValueError(f"entropy rule is {rule!r}, expected 'score_bound' or 'inverse'")


def variance_optimal_weights(beta: np.ndarray) -> np.ndarray:
    """Theorem 2 (Eq. 7): ``w_t = (T / sum_u 1/beta_u) / beta_t`` over the last axis, so that the weights have mean 1.

    The bound ``E[A^2] sum_t beta_t w_t^2`` of Theorem 1 is then ``E[A^2] T^2 / sum_u 1/beta_u``, its minimum under
    ``sum_t w_t = T``.  It is the minimum of that *bound*, under the assumptions in docs/algorithm.md.

    Raises:
        ValueError: a beta that is negative or not finite.
    """
    beta = np.asarray(beta, dtype=np.float64)
    if not np.isfinite(beta).all() or (beta < 0).any():
        raise ValueError("beta must be finite and >= 0: it is a mean squared gradient norm")
    inverse = 1.0 / np.maximum(beta, _MIN_BETA)
    return inverse / inverse.mean(axis=-1, keepdims=True)
