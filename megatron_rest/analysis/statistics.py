"""How much of a difference between two scores is noise: intervals and paired tests over cases.

Cases are the independent units.  What another training seed would have changed is not in any of these numbers: average
each case over the seeds first, and show the spread of the seeds beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "MOST_SEEDS",
    "Interval",
    "McNemar",
    "bootstrap_p",
    "holm",
    "mcnemar",
    "paired_bootstrap",
    "seed_interval",
    "student_p",
    "wilson_interval",
]

_Z95 = 1.959963984540054  # normal quantile of 0.975
# Student's t, quantile of 0.975, for 1, 2, ... degrees of freedom.
_T95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
MOST_SEEDS = len(_T95) + 1
"""Seeds that :func:`seed_interval` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its 95 % interval; as text that of a difference, with signs."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class McNemar:
    """Cases that only one of two models got right, and how likely such a split is by chance."""

    only_a: int
    only_b: int
    p_value: float  # exact, two-sided


def wilson_interval(num_correct: int, num_cases: int) -> Interval:
    """Accuracy with Wilson's score interval, which stays in [0, 1] and works for 0 and all (Wilson 1927)."""
    if not 0 <= num_correct <= num_cases or num_cases == 0:
        raise ValueError(f"{num_correct} of {num_cases} cases is no accuracy")
    p, n, z2 = num_correct / num_cases, num_cases, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(estimate=p, low=max(0.0, centre - half), high=min(1.0, centre + half))


def paired_bootstrap(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of ``b - a`` over cases with its percentile interval; ``a`` and ``b`` score the same cases in one order."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise ValueError(f"paired scores must be two equal lists, got {first.shape} and {second.shape}")
    difference = second - first
    low, high = np.quantile(_resampled_means(difference, num_resamples, seed), [0.025, 0.975])
    return Interval(estimate=float(difference.mean()), low=float(low), high=float(high))


def _resampled_means(difference: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.array(
        [difference[generator.integers(0, len(difference), len(difference))].mean() for _ in range(num_resamples)]
    )


def bootstrap_p(difference: Sequence[float] | np.ndarray, *, num_resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of a mean over cases: the level at which :func:`paired_bootstrap`'s interval just reaches 0.

    Never below ``2 / (num_resamples + 1)``: fewer resamples can say no more (Davison and Hinkley 1997, section 4.2).
    """
    means = _resampled_means(np.asarray(difference, dtype=np.float64), num_resamples, seed)
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (num_resamples + 1))


def student_p(values: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of a mean over seeds (Student's t, n - 1 degrees of freedom); 1 if all values are 0.

    From the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).  Raises ValueError for
    fewer than 2 values.
    """
    seeds = np.asarray(values, dtype=np.float64)
    if seeds.ndim != 1 or len(seeds) < 2:
        raise ValueError(f"a test over seeds needs 2 of them or more, got shape {seeds.shape}")
    error, mean, freedom = float(seeds.std(ddof=1)) / math.sqrt(len(seeds)), float(seeds.mean()), len(seeds) - 1
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    angle = math.atan(abs(mean) / error / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    for k in range(freedom % 2, freedom - 1, 2):  # even: 1 + (1/2) c^2 + ...; odd: c + (2/3) c^3 + ...
        term = (cosine if k == 1 else 1.0) if k < 2 else term * (k - 1) / k * cosine * cosine
        total += term
    within = math.sin(angle) * total
    if freedom % 2:
        within = 2 / math.pi * (angle + within)
    return max(0.0, 1.0 - within)


def holm(p_values: Sequence[float], *, comparisons: int | None = None) -> list[float]:
    """p-values corrected for their number, in their order (Holm 1979): family-wise error stays below a level that a
    corrected value is below.

    Args:
        p_values: of the comparisons that were made.
        comparisons: how many were planned, if more; those that are missing count as not significant.
    """
    count = max(len(p_values), comparisons or 0)
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (count - rank) * p_values[i]))
        corrected[i] = least
    return corrected


def seed_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean over training seeds with Student's 95 % interval; of paired differences it is the paired t-test's.

    Assumes that seeds scatter like a normal distribution.  With 2 seeds it is 12.7 standard errors wide on either side,
    with 3 seeds 4.3: that is what so few can say.  Raises ValueError for fewer than 2 or more than 31 seeds.
    """
    seeds = np.asarray(values, dtype=np.float64)
    if seeds.ndim != 1 or not 2 <= len(seeds) <= MOST_SEEDS:
        raise ValueError(f"an interval over seeds needs 2 to {MOST_SEEDS} of them, got shape {seeds.shape}")
    half = _T95[len(seeds) - 2] * float(seeds.std(ddof=1)) / math.sqrt(len(seeds))
    mean = float(seeds.mean())
    return Interval(estimate=mean, low=mean - half, high=mean + half)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Exact McNemar test of paired right/wrong outcomes: a binomial test of the discordant cases (McNemar 1947)."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return McNemar(only_a=only_a, only_b=only_b, p_value=min(1.0, 2.0 * tail))
