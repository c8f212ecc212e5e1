"""Benchmarks' scores of an experiment's policies, from ``benchmarks.json`` beside each run: means and differences.

Differences are to the algorithm that each is compared with, over the seeds of both that were asked; intervals over
seeds and over cases as everywhere (:func:`megatron_rest.analysis.groups.paired_differences`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rest.analysis.groups import paired_differences
from megatron_rest.analysis.statistics import Interval
from megatron_rest.eval.outcomes import BASELINE, TITLES, Experiment

__all__ = ["BENCHMARKS_FILE", "BenchmarkOutcome", "benchmark_lines", "benchmark_outcomes"]

BENCHMARKS_FILE = "benchmarks.json"
_START = "start"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOutcome:
    """One algorithm on one category, or on all of a benchmark's."""

    algorithm: str  # or "start", the warm start
    benchmark: str
    category: str  # or the benchmark's name: all of its categories
    cases: int
    fitting: int  # cases whose prompt leaves room for an answer; ``cases`` are drawn among them
    all: int
    seeds: tuple[int, ...]
    accuracy: float  # mean over seeds
    difference_over_seeds: Interval | None  # None: nothing to compare with, or one seed
    difference_over_cases: Interval | None


def benchmark_outcomes(experiment: Experiment) -> list[BenchmarkOutcome]:
    """Warm start first, then every algorithm; nothing where no policy was asked.

    Raises ValueError if policies were asked different cases.
    """
    asked: dict[str, dict[int, dict[str, Any]]] = {_START: {}}
    if (start := _stored(experiment.folder / "base" / "warm-start")) is not None:
        asked[_START][0] = start
    for name, policies in experiment.policies.items():
        for policy in policies:
            if (stored := _stored(policy.run.run_dir)) is not None:
                asked.setdefault(name, {})[policy.seed] = stored
    every = [stored for of in asked.values() for stored in of.values()]
    if not every:
        return []
    if any(_cases_of(stored) != _cases_of(every[0]) for stored in every):
        raise ValueError(f"{experiment.folder}: policies were asked different cases of the benchmarks: ask them again")
    groups = _groups(every[0])
    found = []
    for group, categories in groups.items():
        numbers = {
            key: sum(int(every[0]["categories"][c][key]) for c in categories) for key in ("all", "fitting")
        }  # of all policies the same
        for name, by_seed in asked.items():
            if not by_seed:
                continue
            base = experiment.base_of(name) if name != _START else name
            shared = sorted(by_seed.keys() & asked.get(base, {}).keys()) if name != base else []
            seeds = shared or sorted(by_seed)
            own = _table(by_seed, seeds, categories)
            pair = paired_differences(_table(asked[base], shared, categories), own) if shared else (None, None)
            found.append(
                BenchmarkOutcome(
                    algorithm=name,
                    benchmark=str(every[0]["categories"][categories[0]]["benchmark"]),
                    category=group,
                    cases=own.shape[1],
                    **numbers,
                    seeds=tuple(seeds),
                    accuracy=float(own.mean()),
                    difference_over_seeds=pair[0],
                    difference_over_cases=pair[1],
                )
            )
    return found


def _stored(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / BENCHMARKS_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _cases_of(stored: Mapping[str, Any]) -> dict[str, str]:
    return {name: part["cases_sha256"] for name, part in stored["categories"].items()}


def _groups(stored: Mapping[str, Any]) -> dict[str, list[str]]:
    """Each benchmark as a whole, then its categories; those of which nothing was asked are left out."""
    parts = {name: part for name, part in stored["categories"].items() if part["correct"]}
    benchmarks = dict.fromkeys(part["benchmark"] for part in parts.values())
    found: dict[str, list[str]] = {}
    for benchmark in benchmarks:
        own = [name for name, part in parts.items() if part["benchmark"] == benchmark]
        found |= {benchmark: own, **{name: [name] for name in own}}
    return found


def _table(by_seed: Mapping[int, Mapping[str, Any]], seeds: list[int], categories: list[str]) -> np.ndarray:
    """float64 [seeds, cases], 1 where the answer was right."""
    rows = ["".join(by_seed[seed]["categories"][name]["correct"] for name in categories) for seed in seeds]
    return np.array([[float(right) for right in row] for row in rows])


def benchmark_lines(outcomes: Sequence[BenchmarkOutcome]) -> list[str]:
    """Markdown: of each benchmark a row a category, a column an algorithm; then the differences on all of it."""
    lines: list[str] = []
    for benchmark in dict.fromkeys(o.benchmark for o in outcomes):
        rows = [o for o in outcomes if o.benchmark == benchmark]
        names = list(dict.fromkeys(o.algorithm for o in rows))
        lines += [
            f"## {benchmark}: accuracy on cases that leave room for an answer",
            "",
            f"| category | asked, of those that fit, of all | {' | '.join(_title(name) for name in names)} |",
            f"|---|---|{'---|' * len(names)}",
        ]
        for category in dict.fromkeys(o.category for o in rows):
            by_name = {o.algorithm: o for o in rows if o.category == category}
            first = next(iter(by_name.values()))
            label = "all" if category == benchmark else category
            accuracies = " | ".join(f"{by_name[name].accuracy:.3f}" for name in names)
            lines.append(f"| {label} | {first.cases}, {first.fitting}, {first.all} | {accuracies} |")
        lines += [
            "",
            f"| all of {benchmark} | seeds | - baseline, 95 % over seeds | - baseline, 95 % over cases |",
            "|---|---|---|---|",
            *(
                f"| {_title(o.algorithm)} | {', '.join(map(str, o.seeds))} "
                f"| {o.difference_over_seeds or ''} | {o.difference_over_cases or ''} |"
                for o in rows
                if o.category == benchmark and o.algorithm not in (_START, BASELINE)
            ),
            "",
        ]
    return lines


def _title(algorithm: str) -> str:
    return TITLES.get(algorithm, "warm start")
