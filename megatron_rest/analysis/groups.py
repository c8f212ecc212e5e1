"""Groups of runs that differ in their seeds: what each reached, and what the differences are worth.

Two kinds of noise are kept apart: what another training seed would have done (Student's interval over the differences,
paired by seed) and what other prompts would have asked (paired bootstrap over prompts, each averaged over the seeds
first).  ``compare`` and the experiment's tables both come from here.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rest.analysis.configuration import different_settings, settings_of
from megatron_rest.analysis.series import METRICS_FILE, WINDOW, MetricsFileError, RunMetrics, load_runs
from megatron_rest.analysis.statistics import MOST_SEEDS, Interval, paired_bootstrap, seed_interval
from megatron_rest.analysis.summary import LEARNING_METRICS, format_value, own_rewards, table_lines

__all__ = [
    "PROMPT_SCORES",
    "PROMPT_SETS_FILE",
    "RunGroup",
    "SeededRun",
    "common_seeds",
    "group_lines",
    "load_groups",
    "paired_differences",
    "prompt_scores",
]

PROMPT_SETS_FILE = "prompt_sets.json"
"""In a run's folder: what its policy answered to sets of prompts (megatron_rest.eval.prompt_sets)."""
PROMPT_SCORES = ("reward", "accuracy", "format_valid")
Scores = Mapping[str, Mapping[str, np.ndarray]]
"""set -> measure -> float64 [prompts], the mean over answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeededRun:
    """One run of a group."""

    seed: int
    run: RunMetrics
    scores: Scores
    settings: Mapping[str, Any]
    """How ``scores`` were sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunGroup:
    """Runs of one configuration, by seed."""

    label: str
    runs: tuple[SeededRun, ...]

    def of(self, seeds: Sequence[int]) -> list[SeededRun]:
        """The runs of these seeds, in their order."""
        by_seed = {run.seed: run for run in self.runs}
        return [by_seed[seed] for seed in seeds]


def load_groups(words: Sequence[str]) -> list[RunGroup]:
    """A group for each word: a run folder, a pattern of them (``runs/grpo/seed-*``), or a folder that holds some.

    Raises MetricsFileError for what is none, and for a group with a seed twice.
    """
    folders = [_folders(word) for word in words]
    runs = iter(load_runs([path for group in folders for path in group]))
    return [
        _group(word, [_seeded(next(runs)) for _ in group], is_alone=len(group) == 1)
        for word, group in zip(words, folders, strict=True)
    ]


def _folders(word: str) -> list[Path]:
    path = Path(word)
    if (path / METRICS_FILE).is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(word)) if not path.is_dir() else sorted(path.iterdir())
    runs = [one for one in found if (one / METRICS_FILE).is_file()]
    if not runs:
        what = (
            f"cannot read {word}: it holds no run"
            if path.is_dir()
            else f"{word} is not a folder of a run, nor a pattern"
        )
        raise MetricsFileError(f"{what} (a run folder has {METRICS_FILE}); quote patterns: 'runs/grpo/seed-*'")
    return runs


def _seeded(run: RunMetrics) -> SeededRun:
    settings = settings_of(run.run_dir) or {}
    stored = _stored(run.run_dir)
    return SeededRun(
        seed=int(settings.get("trainer.seed", -1)),
        run=run,
        scores=prompt_scores(stored) if stored else {},
        settings=stored.get("settings", {}) if stored else {},
    )


def _group(word: str, runs: list[SeededRun], *, is_alone: bool) -> RunGroup:
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        named = ", ".join("unknown" if seed < 0 else str(seed) for seed in sorted(seeds))
        raise MetricsFileError(
            f"{word}: {len(runs)} runs have the seeds {named}: a group has each seed once (trainer.seed in run.yaml)"
        )
    label = runs[0].run.label if is_alone else word
    return RunGroup(label=label, runs=tuple(sorted(runs, key=lambda run: run.seed)))


def _stored(run_dir: Path) -> dict[str, Any]:
    path = run_dir / PROMPT_SETS_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise MetricsFileError(f"{path} is damaged: {error}") from error


def prompt_scores(stored: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Mean score of every prompt of every set, from a file of :data:`PROMPT_SETS_FILE`."""
    return {
        name: {measure: np.array([np.mean(row[measure]) for row in rows]) for measure in PROMPT_SCORES}
        for name, rows in stored["sets"].items()
    }


def common_seeds(groups: Sequence[RunGroup]) -> list[int]:
    """Seeds that every group has: what is compared."""
    return sorted(set.intersection(*({run.seed for run in group.runs} for group in groups)))


def paired_differences(base: np.ndarray, other: np.ndarray) -> tuple[Interval | None, Interval | None]:
    """``other - base`` over seeds, and over prompts where there are any.

    Args:
        base: float64 [seeds] or [seeds, prompts], paired with ``other`` in both.

    An interval over seeds needs two of them.
    """
    has_prompts = base.ndim == 2
    by_seed = (other - base).mean(axis=1) if has_prompts else other - base
    over_seeds = seed_interval(by_seed) if 2 <= len(by_seed) <= MOST_SEEDS else None
    return over_seeds, paired_bootstrap(base.mean(0), other.mean(0)) if has_prompts else None


def group_lines(groups: Sequence[RunGroup]) -> list[str]:
    """Every group beside the first one, the baseline: training, prompt sets, and what differs in the configurations."""
    base, *others = groups
    seeds = common_seeds(groups)
    lines = [f"{letter} = {group.label}, seeds {_seeds(group)}" for letter, group in _lettered(groups)]
    if not seeds:
        return [*lines, "", "No seed is in every group: nothing can be paired.", *_setting_lines(groups)]
    left_out = [g.label for g in groups if len(g.runs) > len(seeds)]
    lines.append(f"compared: seeds {', '.join(map(str, seeds))}" + (f" (of {', '.join(left_out)})" if left_out else ""))
    lines += ["", *_training_lines(base, others, seeds), *_prompt_lines(groups, seeds), *_setting_lines(groups), ""]
    if len(seeds) == 1:
        lines.append("One seed a side is not evidence: repeat with at least 3 seeds before you claim a difference.")
    else:
        lines.append(
            f"(a to b): 95 % interval; over seeds Student's t of {len(seeds)} differences paired by seed, over prompts "
            "paired bootstrap, each prompt averaged over the seeds first.  Not corrected for the number of rows."
        )
    return lines


def _training_lines(base: RunGroup, others: Sequence[RunGroup], seeds: Sequence[int]) -> list[str]:
    runs = [run.run for group in (base, *others) for run in group.of(seeds)]
    rows = []
    for metric, label, decimals in [*LEARNING_METRICS, *own_rewards(runs)]:
        if not all(run.has(metric) for run in runs):
            continue
        cells = [label]
        first = np.array([run.run.last(metric).mean for run in base.of(seeds)])
        cells.append(format_value(float(first.mean()), decimals))
        for group in others:
            last = np.array([run.run.last(metric).mean for run in group.of(seeds)])
            cells.append(format_value(float(last.mean()), decimals))
            difference, _ = paired_differences(first, last)
            cells.append(_interval(difference, float((last - first).mean()), decimals))
        rows.append(cells)
    header = [f"last {WINDOW} steps, mean over seeds", "A"]
    for letter, _ in _lettered((base, *others))[1:]:
        header += [letter, f"{letter} - A, over seeds"]
    return [*table_lines(header, rows), ""]


def _prompt_lines(groups: Sequence[RunGroup], seeds: Sequence[int]) -> list[str]:
    chosen = [group.of(seeds) for group in groups]
    sets = set.intersection(*(set(run.scores) for runs in chosen for run in runs))
    if not sets:
        return []
    sampled = [{k: v for k, v in r.settings.items() if k != "weights_sha256"} for runs in chosen for r in runs]
    if any(other != sampled[0] for other in sampled):
        return ["Prompt sets: not compared, the policies were asked different prompts or sampled differently.", ""]
    rows = []
    for name in sorted(sets):
        for measure in PROMPT_SCORES:
            tables = [np.array([run.scores[name][measure] for run in runs]) for runs in chosen]
            cells = [f"{name}: {measure} ({tables[0].shape[1]} prompts)", f"{tables[0].mean():.3f}"]
            for table in tables[1:]:
                over_seeds, over_prompts = paired_differences(tables[0], table)
                mean = float((table - tables[0]).mean())
                cells += [f"{table.mean():.3f}", _interval(over_seeds, mean, 3), _interval(over_prompts, mean, 3)]
            rows.append(cells)
    header = ["prompt sets, mean over seeds", "A"]
    for letter, _ in _lettered(groups)[1:]:
        header += [letter, f"{letter} - A, over seeds", f"{letter} - A, over prompts"]
    return [*table_lines(header, rows), ""]


def _setting_lines(groups: Sequence[RunGroup]) -> list[str]:
    """Settings that differ between groups, each group by its first run; and those that differ inside one."""
    found = different_settings([group.runs[0].run.run_dir for group in groups])
    rows = [[key, *values] for key, values in found if key != "trainer.seed"]
    lines = []
    if rows:
        lines += table_lines(["setting that differs", *(letter for letter, _ in _lettered(groups))], rows)
    elif all(settings_of(group.runs[0].run.run_dir) for group in groups):
        lines.append("The configurations are the same.")
    for letter, group in _lettered(groups):
        inside = [k for k, _ in different_settings([r.run.run_dir for r in group.runs]) if k != "trainer.seed"]
        if inside:
            lines.append(f"WARNING: the runs of {letter} differ among themselves in {', '.join(inside)}")
        if any(settings_of(run.run.run_dir) is None for run in group.runs):
            lines.append(f"WARNING: a run of {letter} has no run.yaml or config.yaml: its settings are not known")
    return lines


def _lettered(groups: Sequence[RunGroup]) -> list[tuple[str, RunGroup]]:
    return [(chr(ord("A") + i), group) for i, group in enumerate(groups)]


def _seeds(group: RunGroup) -> str:
    return ", ".join("unknown" if run.seed < 0 else str(run.seed) for run in group.runs)


def _interval(interval: Interval | None, estimate: float, decimals: int) -> str:
    if interval is None:
        return format_value(estimate, decimals, sign=True)
    low, high = (format_value(v, decimals, sign=True) for v in (interval.low, interval.high))
    return f"{format_value(interval.estimate, decimals, sign=True)} ({low} to {high})"
