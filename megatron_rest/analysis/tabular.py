"""The theorems on a tabular softmax policy, where everything can be computed exactly, and the case that breaks them.

    g_i = A_i sum_t w_t grad log pi(a_t | s_t)          Var = trace of the covariance of g_i over sequences
    Theorem 1:  Var <= E[A^2] sum_t beta_t w_t^2,  beta_t = E[||J_t||^2 (1 - exp(-H_t))]      (J_t = dz_t / dtheta)
    Theorem 2:  w_t = (T / sum_u 1/beta_u) / beta_t minimises that bound under sum_t w_t = T

With one row of logits a state, J_t picks a row, so its spectral norm is 1 (the paper's Frobenius norm is larger, its
bound looser), and with an advantage drawn independently of the actions the cross terms vanish.  Both are assumptions,
not facts about language models: :func:`decisive_token` computes the smallest case in which the bound fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.analysis.gradient_variance import WeightingVariance, summarise
from megatron_rest.config import WeightingConfig, WeightSource
from megatron_rest.types import TokenRegion
from megatron_rest.weighting import (
    RestWeighting,
    entropy_weights,
    score_norm_bound,
    variance_optimal_weights,
)

__all__ = ["TabularPolicy", "decisive_token", "tabular_experiment"]

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
            summarise(
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


def _squared_deviations(gradients: Array) -> Array:
    n = len(gradients)
    return ((gradients - gradients.mean(axis=0)) ** 2).sum(axis=1) * n / max(n - 1, 1)
