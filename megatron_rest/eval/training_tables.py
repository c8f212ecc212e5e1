"""How the runs of an experiment went while they trained: tables from their ``metrics.jsonl``, no judged prompt in them.

None of this decides anything (docs/experiment_plan.md); it says how fast an algorithm learned, what became of its
entropies and its answers, and what a step cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_rest.analysis.groups import paired_differences
from megatron_rest.analysis.series import METRICS_FILE, REGIONS, RunMetrics, Window, load_runs
from megatron_rest.eval.outcomes import BASELINE, TITLES, Experiment, pass_steps

__all__ = [
    "RATE_WINDOW",
    "common_regions",
    "entropy_lines",
    "rate_rewards",
    "tokens_of",
    "training_lines",
    "tuning_lines",
]

RATE_WINDOW = 6
"""Last steps, whose mean reward chooses a learning rate."""
_LEAST_SHARE = 0.01  # of a run's tokens; with less, a region's entropy is that of a few stray answers


def rate_rewards(folder: Path) -> dict[str, dict[float, float]]:
    """Mean reward without schedule of the last :data:`RATE_WINDOW` steps, by algorithm and learning rate.

    From ``folder/tuning/ALGORITHM-RATE``, runs on the training prompts alone; those that are not there are left out.
    """
    found: dict[str, dict[float, float]] = {}
    for path in sorted((folder / "tuning").glob("*-*")):
        name, _, rate = path.name.partition("-")
        if (path / METRICS_FILE).is_file():
            [run] = load_runs([path])
            found.setdefault(name, {})[float(rate)] = run.last("reward/static", RATE_WINDOW).mean
    return {name: dict(sorted(rewards.items())) for name, rewards in found.items()}


def tuning_lines(folder: Path) -> list[str]:
    """Markdown: the runs that chose the learning rates; nothing where rates were not tuned."""
    rewards = rate_rewards(folder)
    if not rewards:
        return []
    rates = sorted({rate for of in rewards.values() for rate in of})
    lines = [
        f"## Learning rates (one seed each, mean reward of the last {RATE_WINDOW} steps)",
        "",
        f"| | {' | '.join(f'{rate:g}' for rate in rates)} | taken |",
        f"|---|{'---|' * len(rates)}---|",
    ]
    for name, of in rewards.items():
        cells = [f"{of[rate]:.2f}" if rate in of else "" for rate in rates]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} | {max(of, key=lambda rate: of[rate]):g} |")
    return [*lines, ""]


def training_lines(experiment: Experiment) -> list[str]:
    """Markdown: rollouts of the first and the last steps, what a step cost, and learning as a number."""
    some, window = experiment.policies[BASELINE][0].run, pass_steps(experiment)
    lines = [
        f"## During training ({len(some.rows)} steps)",
        "",
        f"| first {window} -> last {window} steps | reward without schedule | accuracy | valid format "
        "| tokens an answer | gradient norm, mean | seconds a step |",
        "|---|---|---|---|---|---|---|",
    ]
    digits = {"reward/static": 2, "reward/accuracy": 3, "reward/format_valid": 2, "response/length": 0}
    for name in experiment.policies:
        runs = experiment.runs_of(name)
        ends = {metric: _ends(runs, metric, window) for metric in digits}
        cells = [" -> ".join(f"{end.mean:.{digits[metric]}f}" for end in ends[metric]) for metric in digits]
        norm = np.mean([np.mean(run.series("optimizer/grad_norm")[1]) for run in runs])
        seconds = np.mean([np.mean(run.series("total", part="seconds")[1]) for run in runs])
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} | {norm:.2f} | {seconds:.0f} |")
    budget = min(int(tokens_of(run).sum()) for name in experiment.policies for run in experiment.runs_of(name))
    lines += [
        "",
        f"Learning curves as a number: mean over the first {budget / 1000:.1f} thousand tokens that were sampled, "
        "which every run has.",
        "",
        "| | reward without schedule | - baseline, 95 % over seeds | accuracy | - baseline, 95 % over seeds |",
        "|---|---|---|---|---|",
    ]
    for name in experiment.policies:
        cells = []
        for metric, places in (("reward/static", 2), ("reward/accuracy", 3)):
            base = _means(experiment.runs_of(experiment.base_of(name), experiment.seeds_of(name)), metric, budget)
            own = _means(experiment.runs_of(name), metric, budget)
            over_seeds = None if name == BASELINE else paired_differences(base, own)[0]
            cells += [f"{own.mean():.{places}f}", str(over_seeds or "")]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return [*lines, ""]


def entropy_lines(experiment: Experiment) -> list[str]:
    """Markdown: entropy and share of the tokens by region, in the first and the last steps; then thoughts by seed."""
    window, there = pass_steps(experiment), common_regions(experiment)
    lines = [
        "## Entropy by region (nats), and share of the tokens",
        "",
        f"| first {window} -> last {window} steps | {' | '.join(f'{region}: entropy | tokens' for region in there)} |",
        f"|---|{'---|---|' * len(there)}",
    ]
    for name in experiment.policies:
        runs = experiment.runs_of(name)
        cells = []
        for region in there:
            ends = np.mean([_share_ends(run, region, window) for run in runs], axis=0)
            cells.append(" -> ".join(_number(e) for e in _ends(runs, f"entropy/{region}", window)))
            cells.append(" -> ".join(f"{share:.0%}" for share in ends))
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| last {window} steps, each seed | share of the tokens that are thoughts | valid format |",
        "|---|---|---|",
    ]
    for name in experiment.policies:
        runs = experiment.runs_of(name)
        thoughts = ", ".join(f"{_share_ends(run, 'think', window)[1]:.0%}" for run in runs)
        valid = ", ".join(f"{run.last('reward/format_valid', window).mean:.2f}" for run in runs)
        lines.append(f"| {TITLES[name]} | {thoughts} | {valid} |")
    return [*lines, ""]


def common_regions(experiment: Experiment) -> list[str]:
    """Regions with :data:`_LEAST_SHARE` of the tokens of some algorithm."""
    shares = [
        [np.mean(np.nan_to_num(run.shares("tokens")[region])) for region in REGIONS]
        for name in experiment.policies
        for run in experiment.runs_of(name)
    ]
    return [region for region, share in zip(REGIONS, np.max(shares, axis=0), strict=True) if share >= _LEAST_SHARE]


def tokens_of(run: RunMetrics) -> np.ndarray:
    """int [steps]: tokens sampled in each (``response/length`` of every rollout).

    Raises ValueError if a step does not say: curves are by tokens.
    """
    lengths, counts = (run.series(name)[1] for name in ("response/length", "rollout/count"))
    if not len(lengths) == len(counts) == len(run.steps):
        raise ValueError(f"{run.run_dir} has steps without response/length or rollout/count: curves are by tokens")
    return np.rint(lengths * counts).astype(np.int64)


def _share_ends(run: RunMetrics, region: str, window: int) -> tuple[float, float]:
    """Share of the tokens that lie in a region, of the first and of the last steps."""
    share = np.nan_to_num(run.shares("tokens")[region])
    return float(share[:window].mean()), float(share[-window:].mean())


def _number(window: Window) -> str:
    return f"{window.mean:.2f}" if window.num_steps else "-"


def _ends(runs: Sequence[RunMetrics], metric: str, window: int) -> tuple[Window, Window]:
    """Over the runs that have the metric there, of the first and of the last steps; nan where one was not finite."""
    windows = [run.first(metric, window) for run in runs], [run.last(metric, window) for run in runs]
    first, last = (Window.of([one.mean for one in of if one.num_steps]) for of in windows)
    return first, last


def _means(runs: list[RunMetrics], metric: str, budget: int) -> np.ndarray:
    """float64 [runs]: mean of a metric over the first ``budget`` tokens, each step by the tokens it has among them."""
    found = []
    for run in runs:
        tokens = tokens_of(run)
        inside = np.clip(budget - (np.cumsum(tokens) - tokens), 0, tokens)
        found.append(float(inside @ run.series(metric)[1] / inside.sum()))
    return np.array(found)
