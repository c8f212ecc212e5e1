"""Does reweighting lower the variance of the policy gradient?  Measured on a tabular policy, and on gradients of a
model.

    g_i = A_i sum_t w_t grad log pi(a_t | s_t)          Var = trace of the covariance of g_i over sequences
    Theorem 1:  Var <= E[A^2] sum_t beta_t w_t^2,  beta_t = E[||J_t||^2 (1 - exp(-H_t))]      (J_t = dz_t / dtheta)
    Theorem 2:  w_t = (T / sum_u 1/beta_u) / beta_t minimises that bound under sum_t w_t = T

The tabular softmax policy (one row of logits a state) is where the theorems can be checked exactly: J_t picks a row,
so its spectral norm is 1 (the paper's Frobenius norm is larger, its bound looser), and with an advantage drawn
independently of the actions the cross terms vanish.  Both are assumptions, not facts about language models:
:data:`ASSUMPTIONS` says what breaks them and :func:`decisive_token` computes the smallest case in which the bound
fails.

For a model, all that is needed is the Gram matrix of its per-sequence, per-region gradients: every region weighting is
a quadratic form in it, so one pass over the parameters serves all weightings, their differences and their standard
errors.

    python -m megatron_rest.analysis.variance --out runs/variance [--gradients gradients.npz]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rest.config import WeightingConfig, WeightSource
from megatron_rest.types import TokenRegion
from megatron_rest.weighting import (
    RestWeighting,
    entropy_weights,
    score_norm_bound,
    variance_optimal_weights,
)

__all__ = [
    "ASSUMPTIONS",
    "RegionGram",
    "TabularPolicy",
    "WeightingVariance",
    "compare_weightings",
    "decisive_token",
    "entropy_against_score",
    "main",
    "region_gradients",
    "tabular_experiment",
]

ASSUMPTIONS = (
    "Theorem 1 needs the advantage (or its square) to be independent of the scores. A group-relative advantage is not: "
    "it is computed from the reward of the very tokens that it weights.",
    "Theorem 1 drops the cross terms E[<grad_t, grad_u>]; they vanish on-policy only if the advantage is independent "
    "of the actions. With them, Cauchy-Schwarz costs a factor T.",
    "Theorem 2 minimises the bound, not the variance, and unequal weights estimate the gradient of another objective: "
    "a lower variance is no proof of a better step.",
    "As H goes to 0 the rule sends weights to infinity on tokens whose gradient vanishes; floors and caps are part of "
    "the method, and the effective step shrinks after normalisation.",
)

Array = np.ndarray
_REGIONS = len(TokenRegion)
_LAYOUT = (
    (TokenRegion.FORMAT, 1),
    (TokenRegion.THINK, 16),
    (TokenRegion.FORMAT, 6),
    (TokenRegion.TOOL_NAME, 3),
    (TokenRegion.FORMAT, 3),
    (TokenRegion.TOOL_ARGS, 8),
    (TokenRegion.FORMAT, 3),
)
# Mean entropies (nats) of the golden entropy example: structure is nearly certain, the thought is not.
_REGION_ENTROPY = {
    TokenRegion.FORMAT: 0.02,
    TokenRegion.TOOL_NAME: 0.05,
    TokenRegion.TOOL_ARGS: 0.2,
    TokenRegion.THINK: 0.8,
}


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


@dataclass(frozen=True, slots=True)
class TabularPolicy:
    """Softmax policy with one row of logits a state; the next state depends on the action taken."""

    logits: Array  # float64 [S, V]
    region_of_step: Array  # int [T]
    states_of_region: Array  # int [6, P]: the states a step of a region can be in

    @classmethod
    def random(cls, seed: int = 0, *, vocab_size: int = 12, pool: int = 4) -> TabularPolicy:
        """A policy whose regions have about the entropies of tool-use answers, its states 0.6 to 1.4 times that."""
        rng = np.random.default_rng(seed)
        regions = np.repeat([int(r) for r, _ in _LAYOUT], [n for _, n in _LAYOUT])
        states = np.arange(_REGIONS * pool).reshape(_REGIONS, pool)
        logits = rng.normal(size=(_REGIONS * pool, vocab_size))
        for region, entropy in _REGION_ENTROPY.items():
            for state, factor in zip(states[region], np.linspace(0.6, 1.4, pool), strict=True):
                logits[state] = _with_entropy(logits[state], entropy * factor)
        return cls(logits, regions, states)

    @property
    def probabilities(self) -> Array:
        """float64 ``[S, V]``."""
        shifted = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    @property
    def entropy(self) -> Array:
        """float64 ``[S]``, nats."""
        p = self.probabilities
        return -(p * np.log(p)).sum(axis=1)

    def occupancy(self) -> Array:
        """Exact probability of each state at each step, float64 ``[T, S]``."""
        p, pool = self.probabilities, self.states_of_region.shape[1]
        result = np.zeros((len(self.region_of_step), len(p)))
        result[0, self.states_of_region[self.region_of_step[0], 0]] = 1.0
        # Chance of the next action mod pool, which picks the state inside the next step's region.
        by_slot = np.stack([p[:, slot::pool].sum(axis=1) for slot in range(pool)], axis=1)
        for t in range(1, len(result)):
            result[t, self.states_of_region[self.region_of_step[t]]] = result[t - 1] @ by_slot
        return result

    def beta(self) -> Array:
        """Theorem 1's ``E[1 - exp(-H_t)]``, float64 ``[T]`` (the spectral norm of J_t is 1)."""
        return self.occupancy() @ score_norm_bound(self.entropy)

    def score_norm(self) -> Array:
        """Exact ``E ||e_a - p||^2 = E[1 - sum p^2]``, float64 ``[T]``; at most :meth:`beta` (Lemma 2)."""
        return self.occupancy() @ (1.0 - (self.probabilities**2).sum(axis=1))

    def sample(self, rng: np.random.Generator, num_sequences: int) -> tuple[Array, Array]:
        """States and actions, int ``[N, T]`` each."""
        cumulative = np.cumsum(self.probabilities, axis=1)
        pool = self.states_of_region.shape[1]
        shape = (num_sequences, len(self.region_of_step))
        states, actions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        slot = np.zeros(num_sequences, dtype=np.int64)
        for t, region in enumerate(self.region_of_step):
            states[:, t] = self.states_of_region[region, slot]
            draws = rng.random(num_sequences)[:, None] * cumulative[states[:, t], -1:]
            actions[:, t] = (draws > cumulative[states[:, t]]).sum(axis=1)
            slot = actions[:, t] % pool
        return states, actions

    def gradients(self, states: Array, actions: Array, weights: Array) -> Array:
        """``sum_t w_t grad log pi(a_t | s_t)``, float64 ``[N, S * V]``; ``weights`` ``[T]``."""
        p = self.probabilities
        result = np.zeros((len(states), *p.shape))
        rows = np.arange(len(states))
        for t, weight in enumerate(weights):
            result[rows, states[:, t]] -= weight * p[states[:, t]]
            result[rows, states[:, t], actions[:, t]] += weight
        return result.reshape(len(states), -1)


def tabular_experiment(
    *, num_sequences: int = 4000, seed: int = 0, policy: TabularPolicy | None = None
) -> list[WeightingVariance]:
    """Monte-Carlo variance under several weightings, with Theorem 1's bound and the exact value beside each.

    Advantages are standard normal and independent of the actions (the theorems' assumption), so ``E[A^2] = 1`` and the
    exact variance is ``sum_t w_t^2 E ||s_t||^2``.  The first entry is uniform, the last Theorem 2's optimum.
    """
    policy = policy if policy is not None else TabularPolicy.random(seed)
    rng = np.random.default_rng(seed + 1)
    states, actions = policy.sample(rng, num_sequences)
    advantages = rng.normal(size=(num_sequences, 1))
    beta, exact = policy.beta(), policy.score_norm()
    deviations: dict[str, Array] = {}
    results = []
    for name, weights in _tabular_weights(policy, beta).items():
        deviations[name] = _squared_deviations(advantages * policy.gradients(states, actions, weights))
        results.append(
            _summary(
                name,
                deviations[name],
                deviations["uniform"],
                bound=float((beta * weights**2).sum()),
                exact=float((exact * weights**2).sum()),
            )
        )
    return results


def _tabular_weights(policy: TabularPolicy, beta: Array) -> dict[str, Array]:
    """Weights ``[T]`` with mean 1."""
    regions = policy.region_of_step
    step_entropy = policy.occupancy() @ policy.entropy
    means = np.array([step_entropy[regions == r].mean() if (regions == r).any() else 1.0 for r in range(_REGIONS)])
    by_rule = {rule: entropy_weights(means, rule=rule)[regions] for rule in ("score_bound", "inverse")}
    paper = RestWeighting.paper()
    return {
        "uniform": np.ones(len(regions)),
        "ResT constants, progress 0": paper(regions, progress=0.0).astype(np.float64),
        "ResT constants, progress 1": paper(regions, progress=1.0).astype(np.float64),
        "entropy, 1/(1-exp(-H)), unclipped": by_rule["score_bound"] / by_rule["score_bound"].mean(),
        "entropy, 1/H, unclipped": by_rule["inverse"] / by_rule["inverse"].mean(),
        "entropy, as trained (clipped)": _clipped_entropy(regions, means),
        "optimal (Theorem 2)": variance_optimal_weights(beta),
    }


def _clipped_entropy(regions: Array, means: Array) -> Array:
    weighting = RestWeighting(WeightingConfig(source=WeightSource.ENTROPY_EMA))
    present = np.bincount(regions, minlength=_REGIONS)
    weighting.update((means * present).tolist(), present.tolist())
    return weighting(regions, progress=0.0).astype(np.float64)


def decisive_token() -> dict[str, float]:
    """One token with p = (.99, .01) that decides the reward: the advantage is (-.10101, 10), of mean zero.

    The variance is 35 times Theorem 1's bound, because ``A^2`` is large exactly where the score is.  With an advantage
    of the same second moment but independent of the token, the bound holds.
    """
    p = np.array([0.99, 0.01])
    advantages = np.array([-0.1 / 0.99, 10.0])
    scores = np.eye(2) - p
    gradients = advantages[:, None] * scores
    mean = p @ gradients
    second_moment = float(p @ advantages**2)
    entropy = float(-(p * np.log(p)).sum())
    return {
        "mean_squared_advantage": second_moment,
        "entropy": entropy,
        "bound": second_moment * float(score_norm_bound(entropy)),
        "variance": float(p @ (gradients**2).sum(axis=1) - mean @ mean),
        "variance_if_independent": second_moment * float(1 - p @ p),
    }


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
        flat = gradients.reshape(self.num_sequences * _REGIONS, -1).astype(np.float64)
        self.gram += flat @ flat.T

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
) -> list[WeightingVariance]:
    """Variance of a model's policy gradient under each weighting, with uniform first.

    ``variance / signal`` is what a step feels: weights that shrink the whole gradient shrink its variance too.

    Args:
        gram: of the per-sequence, per-region gradients.
        region_counts: valid tokens by region, ``[N, 6]`` (CONTEXT ignored).
        scale: ``[N]``: the advantage, or ``A_i / T_i`` for the paper's sequence mean.
        weightings: by name; normalised per sequence to mean 1 here, as in training.
        progress: of the curriculum.
    """
    counts = np.asarray(region_counts, dtype=np.float64).copy()
    counts[:, TokenRegion.CONTEXT] = 0.0
    plain = np.asarray(scale)[:, None] * np.ones(_REGIONS)
    uniform = gram.squared_deviations(plain)
    results = [_summary("uniform", uniform, uniform, signal=gram.signal(plain))]
    for name, weighting in weightings.items():
        table = weighting.region_weights(progress)
        total = counts @ table
        normalised = table * (counts.sum(axis=1) / np.where(total > 0, total, 1.0))[:, None]
        weighted = np.asarray(scale)[:, None] * normalised
        results.append(_summary(name, gram.squared_deviations(weighted), uniform, signal=gram.signal(weighted)))
    return results


def entropy_against_score(entropy: Array, score_norm: Array, region_ids: Array) -> dict[str, Any]:
    """Entropy (nats) and squared score norm by region, and their correlation over tokens.

    Arrays ``[T]`` over valid tokens; ``score_norm`` is ``1 - sum p^2`` or the exact last-layer ``||h||^2 (1 - sum
    p^2)``.
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
    return {
        "regions": by_region,
        "correlation": float(np.corrcoef(entropy, score_norm)[0, 1]) if varies else None,
    }


def _squared_deviations(gradients: Array) -> Array:
    n = len(gradients)
    return ((gradients - gradients.mean(axis=0)) ** 2).sum(axis=1) * n / max(n - 1, 1)


def _summary(name: str, deviations: Array, uniform: Array, **known: float) -> WeightingVariance:
    """Means of squared deviations are variances; their errors are those of means, the ratio's by the delta method."""
    n, variance, base = len(deviations), float(deviations.mean()), float(uniform.mean())
    ratio = variance / base if base > 0 else float("nan")
    spread = float(np.std(deviations - ratio * uniform, ddof=1)) if n > 1 else float("nan")
    return WeightingVariance(
        name=name,
        variance=variance,
        standard_error=float(np.std(deviations, ddof=1)) / n**0.5 if n > 1 else float("nan"),
        ratio=ratio,
        ratio_standard_error=spread / n**0.5 / base if base > 0 else float("nan"),
        **known,
    )


def _with_entropy(logits: Array, target: float) -> Array:
    """``logits`` sharpened or flattened until their softmax has entropy ``target`` (bisection on the scale)."""
    low, high = 0.0, 1e4
    for _ in range(80):
        scale = (low + high) / 2
        p = np.exp(scale * (logits - logits.max()))
        p /= p.sum()
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
        low, high = (scale, high) if entropy > target else (low, scale)
    return scale * (logits - logits.max())


def _model_section(path: Path) -> dict[str, Any]:
    """From an .npz: region_gradients [N, 6, D], region_counts [N, 6], scale [N]; optional [T] entropy, score_norm and
    region_ids."""
    data = np.load(path)
    counts, scale = data["region_counts"], data["scale"]
    gram = RegionGram(len(scale))
    gram.add_block(data["region_gradients"])
    optimal = RestWeighting(WeightingConfig(source=WeightSource.VARIANCE_OPTIMAL))
    optimal.update(*(part.tolist() for part in gram.beta(scale, counts)))
    weightings = {"ResT constants, progress 0": RestWeighting.paper(), "optimal by region (clipped)": optimal}
    if "entropy" in data:
        entropy = RestWeighting(WeightingConfig(source=WeightSource.ENTROPY_EMA))
        sums = np.bincount(data["region_ids"], weights=data["entropy"], minlength=_REGIONS)
        entropy.update(sums.tolist(), np.bincount(data["region_ids"], minlength=_REGIONS).tolist())
        weightings["entropy, as trained (clipped)"] = entropy
    section: dict[str, Any] = {"variance": [asdict(row) for row in compare_weightings(gram, counts, scale, weightings)]}
    if "entropy" in data and "score_norm" in data:
        section["entropy"] = entropy_against_score(data["entropy"], data["score_norm"], data["region_ids"])
    return section


def _plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 * len(rows) + 1.6), layout="constrained")
    places = np.arange(len(rows))
    errors = [2 * row["standard_error"] for row in rows]
    axes.barh(places, [row["variance"] for row in rows], xerr=errors, label="measured")
    if all(row["bound"] is not None for row in rows):
        axes.plot([row["bound"] for row in rows], places, "k|", markersize=18, label="Theorem 1's bound")
    axes.set_yticks(places, [f"{row['name']}  (x{row['ratio']:.3f})" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("variance of the policy gradient (trace), bars: 2 standard errors")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(rows: list[dict[str, Any]]) -> str:
    columns = ("variance", "standard_error", "exact", "bound", "ratio", "ratio_standard_error", "signal")
    titles = ("variance", "+-", "exact", "bound", "ratio", "+-", "signal")
    lines = [f"{'weights':36s} " + " ".join(f"{title:>9s}" for title in titles)]
    for row in rows:
        cells = [f"{row[name]:9.4f}" if row[name] is not None else f"{'':9s}" for name in columns]
        lines.append(f"{row['name']:36s} " + " ".join(cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the experiment, print tables, write ``variance.json`` and figures; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/variance"), help="folder for variance.json and figures")
    parser.add_argument("--sequences", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gradients", type=Path, help=".npz with a model's per-sequence, per-region gradients")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in tabular_experiment(num_sequences=args.sequences, seed=args.seed)]
    report: dict[str, Any] = {
        "assumptions": list(ASSUMPTIONS),
        "decisive_token": decisive_token(),
        "tabular": {"sequences": args.sequences, "seed": args.seed, "variance": rows},
    }
    print(f"Tabular softmax policy, {args.sequences} sequences, advantage independent of the actions\n{_table(rows)}")
    _plot(rows, "Tabular policy", args.out / "variance_tabular.png")
    if args.gradients:
        report["model"] = _model_section(args.gradients)
        print(f"\nModel, {args.gradients}\n{_table(report['model']['variance'])}")
        _plot(report["model"]["variance"], "Model", args.out / "variance_model.png")
    token = report["decisive_token"]
    print(
        f"\nDecisive token (advantage depends on it): variance {token['variance']:.4f}, bound {token['bound']:.4f}: "
        f"the bound fails; independent advantage: {token['variance_if_independent']:.4f}"
    )
    print("Assumptions:\n" + "\n".join(f"- {line}" for line in ASSUMPTIONS))
    (args.out / "variance.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
