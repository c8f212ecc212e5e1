"""Figures of the experiment: how training went, what differences are worth, where weights and variance lay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_rest.analysis.plots import DPI, GREY, REGION_COLOURS, REGION_TITLES, RUN_COLOURS, STYLE
from megatron_rest.analysis.series import REGIONS, RunMetrics
from megatron_rest.analysis.statistics import seed_interval
from megatron_rest.eval.outcomes import (
    BASELINE,
    MEASURES,
    TITLES,
    Experiment,
    MeasuredVariance,
    Outcome,
    measured_variances,
    pass_steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_experiment"]

_CURVES = {
    "reward/static": "reward without schedule",
    "reward/accuracy": "accuracy (0 to 1)",
    "reward/format_valid": "valid format (share)",
    "entropy/all": "entropy (nats)",
}
_POINTS = 60  # of a curve
_TOKEN_REGIONS = {
    "format": "format", "name": "tool_name", "args": "tool_args", "think": "think", "response": "response"
}  # fmt: skip
_COLOURS = dict(zip(TITLES, cycle(RUN_COLOURS), strict=False))


def plot_experiment(experiment: Experiment, results: Sequence[Outcome], output: Path) -> list[Path]:
    """Write the figures into ``output``; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        figures = {
            "training": _training(experiment),
            "entropy": _entropy(experiment),
            "differences": _differences(experiment, results),
            "weights": _weights(experiment),
        }
        if measured := measured_variances(experiment):
            figures["variance"] = _variance(measured)
        for name, figure in figures.items():
            figure.savefig(output / f"{name}.png", dpi=DPI)
            plt.close(figure)
            written.append(output / f"{name}.png")
    return written


def _training(experiment: Experiment) -> Figure:
    """Means over seeds by tokens sampled, smoothed over one pass over the prompts."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(11, 7))
    for axis, (metric, title) in zip(grid.flat, _CURVES.items(), strict=True):
        _curves(axis, experiment, metric)
        axis.set_title(title)
    _label(figure, grid.flat[0], experiment)
    return figure


def _entropy(experiment: Experiment) -> Figure:
    """The same of the entropy, region by region."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(12, 7))
    for axis, region in zip(grid.flat, REGIONS, strict=False):
        _curves(axis, experiment, f"entropy/{region}")
        axis.set_title(f"entropy, {REGION_TITLES[region]} (nats)")
    grid.flat[-1].remove()
    _label(figure, grid.flat[0], experiment)
    return figure


def _curves(axis: Axes, experiment: Experiment, metric: str) -> None:
    """One line an algorithm, over the seeds shared with the baseline, with the 95 % interval over seeds as a band."""
    width = pass_steps(experiment)
    for name, policies in experiment.policies.items():
        curves = [_curve(p.run, metric, width) for p in policies if p.seed in experiment.seeds_of(name)]
        curves = [(at, values) for at, values in curves if len(at)]
        if not curves:
            continue
        grid = np.linspace(max(at[0] for at, _ in curves), min(at[-1] for at, _ in curves), _POINTS)
        table = np.array([np.interp(grid, at, values) for at, values in curves])
        axis.plot(grid, table.mean(axis=0), color=_COLOURS[name], linewidth=2, label=TITLES[name])
        if len(table) > 1:
            bands = [seed_interval(column) for column in table.T]
            low, high = [b.low for b in bands], [b.high for b in bands]
            axis.fill_between(grid, low, high, color=_COLOURS[name], alpha=0.12, linewidth=0)


def _curve(run: RunMetrics, metric: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Thousand tokens sampled so far (``response/length`` of every rollout) and the smoothed metric."""
    steps, values = run.series(metric)
    at = dict(zip(run.steps, np.cumsum(_tokens(run)), strict=True))
    smooth = _trailing(values, width) if len(values) >= width else values
    is_there = np.isfinite(smooth)
    return np.array([at[step] for step in steps])[is_there] / 1000, smooth[is_there]


def _tokens(run: RunMetrics) -> np.ndarray:
    lengths, counts = (run.series(name)[1] for name in ("response/length", "rollout/count"))
    if not len(lengths) == len(counts) == len(run.steps):
        raise ValueError(f"{run.run_dir} has steps without response/length or rollout/count: curves are by tokens")
    return lengths * counts


def _label(figure: Figure, axis: Axes, experiment: Experiment) -> None:
    width = pass_steps(experiment)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supxlabel(
        "thousand tokens sampled; line: mean over seeds, band: 95 % over seeds"
        + (f"; mean of the last {width} steps" if width > 1 else ""),
        fontsize=9, color=GREY,
    )  # fmt: skip


def _variance(measured: Sequence[MeasuredVariance]) -> Figure:
    """Left the ratio of every weighting to uniform weights, right where squared gradients and tokens lie."""
    import matplotlib.pyplot as plt

    labels = [f"{one.title}, step {one.step['step']}" for one in measured]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.7 * len(measured) + 2.5), sharey=True)
    names = [row["name"] for row in measured[0].step["variance"]][1:]
    for i, (name, colour) in enumerate(zip(names, cycle(RUN_COLOURS), strict=False)):
        found = [next((r for r in one.step["variance"] if r["name"] == name), None) for one in measured]
        rows = [(place, row) for place, row in enumerate(found) if row]
        left.errorbar(
            [row["ratio"] for _, row in rows],
            [place + 0.7 * ((i + 0.5) / len(names) - 0.5) for place, _ in rows],
            xerr=[1.96 * row["ratio_standard_error"] for _, row in rows],
            fmt="o", color=colour, markersize=4, label=name,
        )  # fmt: skip
    left.axvline(1, color=GREY, linewidth=1)
    left.set_xlabel("variance, ratio to uniform weights (95 %)")
    left.legend(fontsize=8)
    for offset, key, shade in ((-0.18, "of_squares", 1.0), (0.18, "of_tokens", 0.45)):
        edge = np.zeros(len(measured))
        for region in REGIONS:
            widths = np.array([100 * _share_of(one, region, key) for one in measured])
            at, title = np.arange(len(measured)) + offset, REGION_TITLES[region] if shade == 1.0 else None
            right.barh(at, widths, 0.33, left=edge, color=REGION_COLOURS[region], alpha=shade, label=title)
            edge = edge + widths
    right.set_xlabel("by region (%): squared gradients (dark), tokens (pale)")
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=len(REGIONS), fontsize=8)
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    return figure


def _share_of(one: MeasuredVariance, region: str, key: str) -> float:
    return float(one.step.get("gradient", {}).get(_TOKEN_REGIONS[region], {}).get(key, 0.0))


def _trailing(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last ``width`` values; nan until there are so many."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    out = np.full(len(values), np.nan)
    out[width - 1 :] = (sums[width:] - sums[:-width]) / width
    return out


def _differences(experiment: Experiment, results: Sequence[Outcome]) -> Figure:
    """Against the baseline with both intervals; zero is no difference."""
    import matplotlib.pyplot as plt

    names = [name for name in experiment.policies if name != BASELINE]
    size = (len(MEASURES), len(experiment.sets))
    figure, grid = plt.subplots(*size, figsize=(13, 8), sharex="row", sharey=True, squeeze=False)
    for row, (measure, title) in zip(grid, MEASURES.items(), strict=True):
        for axis, prompts in zip(row, experiment.sets, strict=True):
            axis.axvline(0, color=GREY, linewidth=1)
            for place, name in enumerate(names):
                [found] = [r for r in results if (r.algorithm, r.prompts, r.measure) == (name, prompts, measure)]
                assert found.difference_over_seeds and found.difference_over_prompts  # not the baseline
                for interval, offset, style in (
                    (found.difference_over_seeds, -0.13, "-"),
                    (found.difference_over_prompts, 0.13, ":"),
                ):
                    at, colour = place + offset, _COLOURS[name]
                    axis.plot([interval.low, interval.high], [at, at], style, color=colour, linewidth=2)
                    axis.plot([interval.estimate], [at], "o", color=colour, markersize=5)
            axis.set_yticks(range(len(names)), [TITLES[name] for name in names])
            axis.set_title(f"{title}, {prompts}")
    grid[0][0].invert_yaxis()
    figure.supxlabel(
        f"difference to {TITLES[BASELINE]}, 95 %: solid over the seeds that both have, dotted over prompts",
        fontsize=9, color=GREY,
    )  # fmt: skip
    return figure


def _weights(experiment: Experiment) -> Figure:
    """Share of tokens and of weight by region, mean over all steps and seeds."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.45 * len(experiment.policies) + 1.8))
    bars = {"share of tokens": _share(experiment, BASELINE, "tokens")}
    bars |= {TITLES[name]: _share(experiment, name, "weight_mass") for name in experiment.policies}
    left = np.zeros(len(bars))
    for i, region in enumerate(REGIONS):
        widths = np.array([share[i] for share in bars.values()])
        axis.barh(range(len(bars)), widths, left=left, color=REGION_COLOURS[region], label=REGION_TITLES[region])
        left = left + widths
    axis.set_yticks(range(len(bars)), list(bars))
    axis.invert_yaxis()
    axis.set_xlabel("share of all token weight, mean over steps and seeds (%)")
    figure.legend(loc="outside upper center", ncols=len(REGIONS))
    return figure


def _share(experiment: Experiment, name: str, prefix: str) -> np.ndarray:
    runs = [p.run for p in experiment.policies[name] if p.seed in experiment.seeds_of(name)]
    shares = [run.shares(prefix) for run in runs]
    return 100 * np.array([np.mean(np.nan_to_num([s[region] for s in shares])) for region in REGIONS])
