"""Random steps of groups with several turns, and their statistics, for tests of token credit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.types import TokenRegion, TrainSample
from megatron_rest.weighting import CreditRows


@dataclass(frozen=True)
class Step:
    """Samples of a step, their rewards, and float64 statistics of every loss token, in order."""

    samples: list[TrainSample]
    rewards: list[float]
    scores: dict[str, np.ndarray]

    def rows(self, which: list[int] | None = None, *, needs: frozenset[str] = frozenset()) -> CreditRows:
        """Of all samples, or of some."""
        which = list(range(len(self.samples))) if which is None else which
        owner = np.repeat(np.arange(len(self.samples)), [int(s.loss_mask.sum()) for s in self.samples])
        at = np.concatenate([np.zeros(0, np.int64), *(np.flatnonzero(owner == i) for i in which)])
        return CreditRows.of_samples(
            [self.samples[i] for i in which],
            rewards=[self.rewards[i] for i in which],
            progress=0.3,
            scores={name: self.scores[name][at] for name in needs - {"marks", "token_rewards"}},
        )

    def by_rollout(self, name: str) -> list[np.ndarray]:
        """A statistic of each rollout's loss tokens."""
        ends = np.cumsum([int(s.loss_mask.sum()) for s in self.samples])
        return np.split(self.scores[name], ends[:-1])


def random_step(seed: int = 0, *, groups: int = 3, size: int = 4, vocabulary: int = 97, longest: int = 30) -> Step:
    """Groups that share a prompt; one rollout without loss, one token long, one that succeeds alone."""
    rng, fine = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    samples: list[TrainSample] = []
    rewards: list[float] = []
    for group in range(groups):
        prompt = rng.integers(1, vocabulary, int(rng.integers(4, 12)))
        reward = rng.integers(-3, 5, size).astype(float)
        if group == 1:
            reward[:] = 2.0
        centred = reward - reward.mean()
        for i in range(size):
            length = 1 if (group, i) == (0, 1) else int(rng.integers(5, longest))
            sampled = np.ones(length, bool)
            if length > 8:
                sampled[3 : int(rng.integers(5, 8))] = False  # a tool's output between two turns
            if (group, i) == (2, 2):
                sampled[:] = False  # infrastructure ended it
            regions = np.where(sampled, rng.integers(1, len(TokenRegion), length), int(TokenRegion.CONTEXT))
            none = np.zeros(len(prompt))
            samples.append(
                TrainSample(
                    token_ids=np.concatenate([prompt, rng.integers(1, vocabulary, length)]).astype(np.int32),
                    loss_mask=np.concatenate([none.astype(bool), sampled]),
                    region_ids=np.concatenate([none, regions]).astype(np.int8),
                    rollout_log_probs=np.concatenate([none, np.where(sampled, -3.0, 0.0)]).astype(np.float32),
                    advantage=float(centred[i]),
                    sequence_id=len(samples),
                    group_id=group,
                    marks=np.concatenate([none, rng.choice([0, 0, 0, 1, 2, 3], length)]).astype(np.uint8),
                    token_rewards=_token_rewards(fine, len(prompt), sampled, kind=(group + i) % 4),
                )
            )
            rewards.append(float(reward[i]))
    count = sum(int(s.loss_mask.sum()) for s in samples)
    log_probs = -rng.exponential(0.7, count)
    scores = {
        "log_probs": log_probs,
        "entropy": rng.gamma(0.6, 0.8, count) + 1e-3,
        "sum_p2": np.exp(2 * log_probs) + (1 - np.exp(log_probs)) ** 2 * rng.random(count),
        "beta": rng.exponential(2.0, count),
    }
    # as the scoring pass hands them over
    return Step(samples, rewards, {n: v.astype(np.float32).astype(np.float64) for n, v in scores.items()})


def _token_rewards(rng: np.random.Generator, prompt: int, sampled: np.ndarray, *, kind: int) -> np.ndarray | None:
    """Of no token, of each turn's last one, of some, of all."""
    if kind == 0:
        return None
    ends = sampled & ~np.append(sampled[1:], False)
    told = {1: ends, 2: sampled & (rng.random(len(sampled)) < 0.3), 3: sampled}[kind]
    earned = np.where(told, rng.integers(-2, 3, len(sampled)) / 4, np.nan)
    return np.concatenate([np.full(prompt, np.nan), earned])
