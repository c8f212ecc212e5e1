"""Variance of a model's policy gradient under any region weighting, from one pass over its gradients.

    g_i = c_i sum_r w_ir G_ir          G_ir = sum over the tokens t of sequence i in region r of grad log pi(t)

Every region weighting is a quadratic form in the Gram matrix of the ``G_ir``, so one pass over the parameters serves
all weightings, their differences and their standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rest.types import TokenRegion
from megatron_rest.weighting import RestWeighting

__all__ = [
    "GradientSketch",
    "RegionGram",
    "WeightingVariance",
    "compare_weightings",
    "entropy_against_score",
    "region_gradients",
    "summarise",
]

Array = np.ndarray
_REGIONS = len(TokenRegion)
_COLUMNS = 16_384  # few enough that a float32 product's rounding stays near 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightingVariance:
    """Variance of the gradient estimator under one weighting, beside uniform weights on the same samples."""

    name: str
    variance: float  # trace of the covariance over sequences
    standard_error: float
    ratio: float  # to uniform weights
    ratio_standard_error: float  # paired: the same sequences under both weightings
    bound: float | None = None  # Theorem 1, where beta is known
    exact: float | None = None  # true variance, where it can be computed
    signal: float | None = None  # squared norm of the mean gradient, unbiased (may be < 0 by noise), where it is not 0


class RegionGram:
    """Inner products of per-sequence, per-region gradients ``G_ir = sum over t in region r of grad log pi``.

    Add the parameters block by block (a layer, a shard): inner products add up, so no rank ever holds a whole gradient
    per sequence.  Shards of different ranks are added with one all-reduce of :attr:`gram`.
    """

    def __init__(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences
        self.gram = np.zeros((num_sequences * _REGIONS, num_sequences * _REGIONS))

    def add_block(self, gradients: Array) -> None:
        """``gradients`` ``[N, 6, d]``: some of the parameters' gradients of every sequence and region."""
        gradients = np.asarray(gradients)
        if gradients.ndim != 3 or gradients.shape[:2] != (self.num_sequences, _REGIONS):
            raise ValueError(f"gradients have shape {gradients.shape}, expected ({self.num_sequences}, {_REGIONS}, d)")
        flat = gradients.reshape(self.num_sequences * _REGIONS, -1)
        self.add_rows(flat, np.arange(len(flat)))

    def add_rows(self, gradients: Array, rows: Array) -> None:
        """The same for some (sequence, region) pairs; the others' gradients are 0.

        Products are taken in the arrays' own precision, 16,384 parameters at a time, and added up in float64.

        Args:
            gradients: ``[R, d]``.
            rows: int ``[R]``, ``6 * sequence + region`` of each, no number twice.
        """
        for start in range(0, gradients.shape[1], _COLUMNS):
            part = gradients[:, start : start + _COLUMNS]
            self.gram[np.ix_(rows, rows)] += part @ part.T

    def squared_deviations(self, coefficients: Array) -> Array:
        """``n/(n-1) ||g_i - mean g||^2`` of ``g_i = sum_r c_ir G_ir``, float64 ``[N]``; their mean is the variance."""
        inner, n = self._inner(coefficients), self.num_sequences
        return (np.diag(inner) - 2 * inner.mean(axis=1) + inner.mean()) * n / max(n - 1, 1)

    def signal(self, coefficients: Array) -> float:
        """Unbiased estimate of ``||E g||^2``: the mean inner product of gradients of different sequences."""
        inner, n = self._inner(coefficients), self.num_sequences
        return float((inner.sum() - np.trace(inner)) / max(n * (n - 1), 1))

    def _inner(self, coefficients: Array) -> Array:
        """``<g_i, g_j>``, float64 ``[N, N]``."""
        coefficients = np.asarray(coefficients, dtype=np.float64)
        if coefficients.shape != (self.num_sequences, _REGIONS):
            expected = (self.num_sequences, _REGIONS)
            raise ValueError(f"coefficients have shape {coefficients.shape}, expected {expected}")
        n = self.num_sequences
        scaled = coefficients.reshape(-1, 1) * self.gram * coefficients.reshape(1, -1)
        return scaled.reshape(n, _REGIONS, n, _REGIONS).sum(axis=(1, 3))

    def beta(self, scale: Array, region_counts: Array) -> tuple[Array, Array]:
        """Sum of ``scale_i^2 ||G_ir||^2`` and number of tokens by region, float64 ``[6]`` each: what
        :meth:`RestWeighting.update` takes for ``variance_optimal`` (cross terms inside a region are counted in)."""
        norms = np.diag(self.gram).reshape(self.num_sequences, _REGIONS)
        return (np.asarray(scale)[:, None] ** 2 * norms).sum(axis=0), np.asarray(region_counts).sum(axis=0)

    def by_region(self, scale: Array, region_counts: Array) -> dict[str, dict[str, float]]:
        """How much of the squared gradients, ``sum_i scale_i^2 ||G_ir||^2``, and of the tokens each region has, 0 to 1.

        Only sequences with an advantage count.  Products between regions are in none of them.
        """
        squares, tokens = self.beta(scale, np.asarray(region_counts) * (np.asarray(scale) != 0)[:, None])
        return {
            region.name.lower(): {
                "of_squares": float(squares[region] / max(squares.sum(), 1e-300)),
                "of_tokens": float(tokens[region] / max(tokens.sum(), 1)),
            }
            for region in TokenRegion
            if tokens[region]
        }


class GradientSketch:
    """Random signed sums of a gradient's numbers, whose inner products estimate the gradients' own, without bias.

        S x = [sum over i with i mod k = j of s_i x_i  for j < k],   s_i = +1 or -1 at random;   E <S x, S y> = <x, y>

    Feature hashing (Weinberger et al., arXiv 0902.2206): the standard deviation of ``||S x||^2`` is about
    ``sqrt(2 / k) ||x||^2`` where no few numbers hold most of the norm.  What does not fit into memory whole, a
    gradient for every sequence and region of 135 M parameters, is small in this form.

    Args:
        parameters: in the order in which gradients will come.
        columns: k.  A prime keeps the columns of matrices from falling onto each other.
        seed: of the signs.  All gradients to be compared need the same.
    """

    def __init__(self, parameters: Sequence[Tensor], *, columns: int, seed: int = 0) -> None:
        if columns < 1:
            raise ValueError(f"columns is {columns}, expected 1 or more")
        generator = torch.Generator().manual_seed(seed)
        self.columns = columns
        self._signs = [
            torch.randint(0, 2, (p.numel(),), generator=generator, dtype=torch.int8).mul_(2).sub_(1) for p in parameters
        ]

    def __call__(self, parts: Sequence[Tensor]) -> Array:
        """float32 ``[k]`` of one gradient, given as a tensor for each parameter, on the CPU."""
        result = torch.zeros(self.columns)
        start = 0  # column of the tensor's first number
        for part, signs in zip(parts, self._signs, strict=True):
            signed = part.detach().flatten().float() * signs
            signed = torch.nn.functional.pad(signed, (start, -(start + len(signed)) % self.columns))
            result += signed.view(-1, self.columns).sum(dim=0)
            start = (start + part.numel()) % self.columns
        return result.numpy()


def region_gradients(
    log_probs: Tensor, region_ids: Tensor, sequence_ids: Tensor, parameters: Sequence[Tensor], *, num_sequences: int
) -> tuple[Array, Array]:
    """Per-sequence, per-region gradients of a model on one process, for :meth:`RegionGram.add_block`.

    Args:
        log_probs: float ``[T]`` with a graph, log pi of the sampled tokens of all sequences.
        region_ids: int ``[T]``; CONTEXT tokens are left out.
        sequence_ids: int ``[T]``, 0 to ``num_sequences - 1``.
        parameters: what to differentiate by, ``D`` numbers in all.
        num_sequences: N.

    Returns:
        Gradients float32 ``[N, 6, D]`` (24 N D bytes: small models or some layers only; one backward pass for each
        sequence and region that occurs) and token counts int ``[N, 6]``.
    """
    index = sequence_ids.long() * _REGIONS + region_ids.long()
    counts = torch.bincount(index, minlength=num_sequences * _REGIONS).reshape(num_sequences, _REGIONS)
    counts[:, TokenRegion.CONTEXT] = 0
    sums = log_probs.new_zeros(num_sequences * _REGIONS).index_add(0, index, log_probs)
    result = np.zeros((num_sequences * _REGIONS, sum(p.numel() for p in parameters)), dtype=np.float32)
    for row in counts.flatten().nonzero().flatten().tolist():
        parts = torch.autograd.grad(sums[row], parameters, retain_graph=True, materialize_grads=True)
        result[row] = torch.cat([part.flatten() for part in parts]).float().cpu().numpy()
    return result.reshape(num_sequences, _REGIONS, -1), counts.cpu().numpy()


def compare_weightings(
    gram: RegionGram,
    region_counts: Array,
    scale: Array,
    weightings: Mapping[str, RestWeighting],
    *,
    progress: float = 0.0,
    clusters: Array | None = None,
) -> list[WeightingVariance]:
    """Variance of a model's policy gradient under each weighting, with uniform first.

    ``variance / signal`` is what a step feels: weights that shrink the whole gradient shrink its variance too.

    Args:
        gram: of the per-sequence, per-region gradients.
        region_counts: valid tokens by region, ``[N, 6]`` (CONTEXT ignored).
        scale: ``[N]``: the advantage, or ``A_i / T_i`` for the paper's sequence mean.
        weightings: by name; normalised per sequence to mean 1 here, as in training.
        progress: of the curriculum.
        clusters: int ``[N]``, sequences that are not independent of each other (siblings of a prompt); None = all are.
    """
    counts = np.asarray(region_counts, dtype=np.float64).copy()
    counts[:, TokenRegion.CONTEXT] = 0.0
    plain = np.asarray(scale)[:, None] * np.ones(_REGIONS)
    uniform = gram.squared_deviations(plain)
    results = [summarise("uniform", uniform, uniform, clusters=clusters, signal=gram.signal(plain))]
    for name, weighting in weightings.items():
        table = weighting.region_weights(progress)
        total = counts @ table
        normalised = table * (counts.sum(axis=1) / np.where(total > 0, total, 1.0))[:, None]
        weighted = np.asarray(scale)[:, None] * normalised
        deviations, signal = gram.squared_deviations(weighted), gram.signal(weighted)
        results.append(summarise(name, deviations, uniform, clusters=clusters, signal=signal))
    return results


def entropy_against_score(entropy: Array, score_norm: Array, region_ids: Array) -> dict[str, Any]:
    """Entropy (nats) and squared score norm by region, and their correlation over tokens.

    Arrays ``[T]`` over valid tokens; ``score_norm`` is ``1 - sum p^2`` or the exact last-layer ``||h||^2 (1 - sum
    p^2)``.  ``tenths``: mean entropy and score norm of the tenth of the tokens with the least entropy, and so on.
    """
    by_region = {}
    for region in TokenRegion:
        chosen = np.asarray(region_ids) == region
        if chosen.any():
            by_region[region.name.lower()] = {
                "tokens": int(chosen.sum()),
                "entropy": float(np.mean(entropy[chosen])),
                "score_norm": float(np.mean(score_norm[chosen])),
            }
    varies = np.std(entropy) > 0 and np.std(score_norm) > 0
    tenths = [part for part in np.array_split(np.argsort(entropy, kind="stable"), 10) if len(part)]
    return {
        "regions": by_region,
        "tenths": [[float(np.mean(entropy[part])), float(np.mean(score_norm[part]))] for part in tenths],
        "correlation": float(np.corrcoef(entropy, score_norm)[0, 1]) if varies else None,
    }


def summarise(
    name: str, deviations: Array, uniform: Array, *, clusters: Array | None = None, **known: float
) -> WeightingVariance:
    """Means of squared deviations ``[N]`` are variances; their errors are those of means, the ratio's by the delta
    method on the same sequences."""
    variance, base = float(deviations.mean()), float(uniform.mean())
    ratio = variance / base if base > 0 else float("nan")
    return WeightingVariance(
        name=name,
        variance=variance,
        standard_error=_error_of_mean(deviations, clusters),
        ratio=ratio,
        ratio_standard_error=_error_of_mean(deviations - ratio * uniform, clusters) / base
        if base > 0
        else float("nan"),
        **known,
    )


def _error_of_mean(values: Array, clusters: Array | None) -> float:
    """Standard error of the mean of ``values`` ``[N]``, whose clusters are independent of each other."""
    index = np.arange(len(values)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(index, weights=values - values.mean())
    count = len(sums)
    return float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(values)) if count > 1 else float("nan")
