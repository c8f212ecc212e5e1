"""Policies of several algorithms and seeds, read from their runs, and what each is worth beside the baseline.

Two kinds of noise are kept apart: what another training seed would have done (intervals over seeds, paired by seed) and
what other prompts would have asked (intervals over prompts, each averaged over the seeds first).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rest.analysis.evidence import read_evidence
from megatron_rest.analysis.groups import paired_differences, prompt_scores
from megatron_rest.analysis.series import RunMetrics, load_runs
from megatron_rest.analysis.statistics import Interval
from megatron_rest.config import load
from megatron_rest.eval.prompt_sets import RESULT_FILE

__all__ = [
    "AGAINST",
    "BASELINE",
    "MEASURES",
    "SETS",
    "TITLES",
    "Experiment",
    "MeasuredVariance",
    "Outcome",
    "measured_variances",
    "outcomes",
    "pass_steps",
    "read_experiment",
]

BASELINE = "grpo"
AGAINST = {"paper_dr": "dr_grpo"}
"""What is compared with another algorithm than the baseline: one that differs from it in the weights alone."""
MEASURES = {"reward": "reward", "accuracy": "accuracy", "format_valid": "valid format"}
SETS = {
    "rl": "prompts of RL",
    "seen": "prompts of the warm start that RL does not use",
    "heldout": "prompts that no training has seen",
}
TITLES = {
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "paper": "ResT, paper",
    "reference_code": "ResT, published code's weights",
    "entropy_ema": "ResT, entropy-EMA",
    "variance_optimal": "ResT, variance-optimal",
    "paper_grpo_rate": "ResT, paper, at GRPO's rate",
    "paper_still": "ResT, paper, no curriculum",
    "paper_dr": "ResT, paper, on Dr. GRPO",
    "paper_backwards": "ResT, paper, curriculum backwards",
    "otb": "OTB",
    "empg": "EMPG",
    "entropy_mask": "80/20",
    "gtpo": "GTPO",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """One trained policy: its run, and its mean score on every prompt of every set."""

    seed: int
    run: RunMetrics
    scores: Mapping[str, Mapping[str, np.ndarray]]  # set -> measure -> float64 [prompts], the mean over answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """All policies by algorithm; those of one algorithm by seed."""

    folder: Path
    start: Mapping[str, Mapping[str, np.ndarray]]  # the warm start's scores
    policies: Mapping[str, Sequence[Policy]]
    left_out: Mapping[str, int] = field(default_factory=dict)  # too few for an interval -> seeds shared with its base

    @property
    def seeds(self) -> list[int]:
        """Seeds that every algorithm has."""
        common = set.intersection(*({p.seed for p in ps} for ps in self.policies.values()))
        return sorted(common)

    def base_of(self, algorithm: str) -> str:
        """What an algorithm is compared with."""
        named = AGAINST.get(algorithm, BASELINE)
        return named if named in self.policies else BASELINE

    def seeds_of(self, algorithm: str) -> list[int]:
        """Those that an algorithm shares with what it is compared with."""
        base, own = ({p.seed for p in self.policies[name]} for name in (self.base_of(algorithm), algorithm))
        return sorted(base & own)

    def runs_of(self, algorithm: str, seeds: Sequence[int] | None = None) -> list[RunMetrics]:
        """Its runs by seed; those of :meth:`seeds_of` unless ``seeds`` are given."""
        wanted = self.seeds_of(algorithm) if seeds is None else seeds
        return [policy.run for policy in self.policies[algorithm] if policy.seed in wanted]

    def pair(self, algorithm: str, prompts: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores of what it is compared with, and its own, at the seeds of both: float64 [seeds, prompts] each."""
        seeds = self.seeds_of(algorithm)
        base, own = (self.table(n, prompts, measure, seeds) for n in (self.base_of(algorithm), algorithm))
        return base, own

    def table(self, algorithm: str, prompts: str, measure: str, seeds: Sequence[int]) -> np.ndarray:
        """float64 [seeds, prompts]."""
        return np.array([p.scores[prompts][measure] for p in self.policies[algorithm] if p.seed in seeds])

    @property
    def sets(self) -> list[str]:
        """Sets of prompts that were asked."""
        return [name for name in SETS if name in self.start]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One algorithm on one set by one measure, over the common seeds."""

    algorithm: str
    prompts: str
    measure: str
    start: float
    by_seed: tuple[float, ...]
    base: str  # the algorithm that the differences are to
    difference_over_seeds: Interval | None  # paired by seed; None of the baseline itself
    difference_over_prompts: Interval | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed))


def read_experiment(folder: str | Path) -> Experiment:
    """Every finished and evaluated run of algorithms that have two seeds to compare.

    Raises ValueError naming what is missing when there is nothing to compare.
    """
    root = Path(folder)
    policies: dict[str, list[Policy]] = {}
    settings = []
    for name in TITLES:
        for path in sorted((root / name).glob("seed-*"), key=lambda p: int(p.name.removeprefix("seed-"))):
            if not (path / "config.yaml").is_file() or not (path / RESULT_FILE).is_file():
                continue  # still training, or not yet evaluated
            stored = _stored(path)
            settings.append({k: v for k, v in stored["settings"].items() if k != "weights_sha256"})
            [run] = load_runs([path])
            seed = int(path.name.removeprefix("seed-"))
            policies.setdefault(name, []).append(Policy(seed=seed, run=run, scores=prompt_scores(stored)))
    if BASELINE not in policies or len(policies) < 2:
        raise ValueError(f"{root} holds no finished and evaluated runs of {BASELINE} and another algorithm")
    start = _stored(root / "base" / "warm-start")
    settings.append({k: v for k, v in start["settings"].items() if k != "weights_sha256"})
    if any(other != settings[0] for other in settings):
        raise ValueError(f"{root}: policies were asked different prompts or sampled differently: evaluate them again")
    every = Experiment(folder=root, start=prompt_scores(start), policies=policies)
    shared = {name: len(every.seeds_of(name)) for name in policies}
    few = {name: count for name, count in shared.items() if count < 2}
    if BASELINE in few or len(policies) - len(few) < 2:
        have = ", ".join(f"{name} {count}" for name, count in shared.items())
        raise ValueError(f"{root}: seeds shared with what is compared with: {have}; an interval needs 2")
    compared = {name: found for name, found in policies.items() if name not in few}
    return replace(every, policies=compared, left_out=few)


def _stored(path: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((path / RESULT_FILE).read_text(encoding="utf-8"))
    return stored


def outcomes(experiment: Experiment) -> list[Outcome]:
    """Every algorithm on every set by every measure."""
    found = []
    for prompts in experiment.sets:
        for measure in MEASURES:
            for name in experiment.policies:
                base, table = experiment.pair(name, prompts, measure)
                over_seeds, over_prompts = paired_differences(base, table)
                is_base = name == BASELINE
                found.append(
                    Outcome(
                        algorithm=name,
                        prompts=prompts,
                        measure=measure,
                        start=float(experiment.start[prompts][measure].mean()),
                        by_seed=tuple(float(v) for v in table.mean(axis=1)),
                        base=experiment.base_of(name),
                        difference_over_seeds=None if is_base else over_seeds,
                        difference_over_prompts=None if is_base else over_prompts,
                    )
                )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredVariance:
    """The variance of the policy gradient at one step of one run."""

    title: str  # algorithm and seed
    step: Mapping[str, Any]  # as in ``variance.json``


def measured_variances(experiment: Experiment) -> list[MeasuredVariance]:
    """Of all runs beside which ``variance.json`` lies, by algorithm, seed and step."""
    return [
        MeasuredVariance(title=f"{TITLES[name]}, seed {policy.seed}", step=step)
        for name, policies in experiment.policies.items()
        for policy in policies
        for step in read_evidence(policy.run.run_dir)
    ]


def pass_steps(experiment: Experiment) -> int:
    """Steps in which every prompt of RL is asked once; a quarter of the run where these were not judged."""
    if "rl" not in experiment.start:
        return max(1, len(experiment.policies[BASELINE][0].run.rows) // 4)
    prompts = len(next(iter(experiment.start["rl"].values())))
    run = experiment.policies[BASELINE][0].run
    return -(-prompts // load(run.run_dir / "config.yaml").data.prompts_per_step)
