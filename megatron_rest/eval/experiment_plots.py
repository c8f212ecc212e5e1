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
from megatron_rest.eval.training_tables import common_regions, tokens_of

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
_SHARES = ("reward/accuracy", "reward/format_valid")
_FEWEST_FOR_A_BAND = 3  # Student's interval of two seeds is 12.7 standard errors to either side
_POINTS = 60  # of a curve
_PANELS = 4  # side by side
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
            "seeds": _seeds(experiment),
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
    there = common_regions(experiment)
    figure, axes = _panels(len(there), 2, (11, 7))
    for axis, region in zip(axes, there, strict=True):
        _curves(axis, experiment, f"entropy/{region}")
        axis.set_title(f"entropy, {REGION_TITLES[region]} (nats)")
    _label(figure, axes[0], experiment)
    return figure


def _seeds(experiment: Experiment) -> Figure:
    """Every run of every algorithm by itself, a panel each: what broke is seen, which a mean of few seeds hides."""
    metric = next(iter(_CURVES))
    names, width = list(experiment.policies), pass_steps(experiment)
    height = 2.3 * -(-len(names) // _PANELS) + 0.7
    figure, axes = _panels(len(names), _PANELS, (13, height), sharex=True, sharey=True)
    base = _mean_curve([_curve(run, metric, width) for run in experiment.runs_of(BASELINE)])
    for axis, name in zip(axes, names, strict=True):
        if base is not None:
            axis.plot(base[0], base[1].mean(axis=0), "--", color=GREY, linewidth=1.5)
        for run in experiment.runs_of(name):
            axis.plot(*_curve(run, metric, width), color=_COLOURS[name], linewidth=1.2)
        axis.set_title(TITLES[name])
        axis.tick_params(labelbottom=name in names[-_PANELS:])  # the lowest of its column
    figure.supxlabel(
        f"{_CURVES[metric]} by thousand tokens sampled; a line a seed, dashed the mean of {TITLES[BASELINE]}",
        fontsize=9, color=GREY,
    )  # fmt: skip
    return figure


def _panels(
    count: int, columns: int, size: tuple[float, float], *, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """As many panels as asked for, in rows of ``columns``; the last row may have fewer."""
    import matplotlib.pyplot as plt

    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharex=sharex, sharey=sharey, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _most_seeds(experiment: Experiment) -> list[str]:
    """Algorithms with as many seeds as any: a band of few seeds hides those of many, so they share no picture."""
    counts = {name: len(experiment.seeds_of(name)) for name in experiment.policies}
    most = max(counts.values())
    return [name for name, count in counts.items() if count == most]


def _curves(axis: Axes, experiment: Experiment, metric: str) -> None:
    """One line for each of :func:`_most_seeds`, their mean, with the 95 % interval over seeds as a band."""
    width = pass_steps(experiment)
    for name in _most_seeds(experiment):
        mean = _mean_curve([_curve(run, metric, width) for run in experiment.runs_of(name)])
        if mean is None:
            continue
        grid, table = mean
        axis.plot(grid, table.mean(axis=0), color=_COLOURS[name], linewidth=2, label=TITLES[name])
        if len(table) >= _FEWEST_FOR_A_BAND:
            bands = [seed_interval(column) for column in table.T]
            edges = [b.low for b in bands], [b.high for b in bands]
            axis.fill_between(grid, *edges, color=_COLOURS[name], alpha=0.12, linewidth=0)
    low, high = axis.get_ylim()
    if metric in _SHARES or metric.startswith("entropy/"):  # a band of Student's knows no bounds, these measures do
        axis.set_ylim(max(0.0, low), min(1.0, high) if metric in _SHARES else high)


def _mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Where all runs are, and their values there [runs, points]; None if no run has any."""
    curves = [(at, values) for at, values in curves if len(at)]
    if not curves:
        return None
    grid = np.linspace(max(at[0] for at, _ in curves), min(at[-1] for at, _ in curves), _POINTS)
    return grid, np.array([np.interp(grid, at, values) for at, values in curves])


def _curve(run: RunMetrics, metric: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Thousand tokens sampled so far (``response/length`` of every rollout) and the smoothed metric."""
    steps, values = run.series(metric)
    at = dict(zip(run.steps, np.cumsum(tokens_of(run)), strict=True))
    smooth = _trailing(values, width) if len(values) >= width else values
    is_there = np.isfinite(smooth)
    return np.array([at[step] for step in steps])[is_there] / 1000, smooth[is_there]


def _label(figure: Figure, axis: Axes, experiment: Experiment) -> None:
    width, few = pass_steps(experiment), len(experiment.policies) - len(_most_seeds(experiment))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supxlabel(
        "thousand tokens sampled; line: mean over seeds, band: 95 % over three seeds or more"
        + (f"; mean of the last {width} steps" if width > 1 else "")
        + (f"; {few} methods with fewer seeds are in seeds.png" if few else ""),
        fontsize=9, color=GREY,
    )  # fmt: skip


def _variance(measured: Sequence[MeasuredVariance]) -> Figure:
    """Left the ratio of every weighting to uniform weights, right where squared gradients and tokens lie."""
    import matplotlib.pyplot as plt

    labels = [f"{one.title}, step {one.step['step']}" for one in measured]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.7 * len(measured) + 3.2), sharey=True)
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
    for offset, key, shade in ((-0.18, "of_squares", 1.0), (0.18, "of_tokens", 0.45)):
        edge = np.zeros(len(measured))
        for region in REGIONS:
            widths = np.array([100 * _share_of(one, region, key) for one in measured])
            at, title = np.arange(len(measured)) + offset, REGION_TITLES[region] if shade == 1.0 else None
            right.barh(at, widths, 0.33, left=edge, color=REGION_COLOURS[region], alpha=shade, label=title)
            edge = edge + widths
    right.set_xlabel("by region (%): squared gradients (dark), tokens (pale)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8)
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
    rows, columns, height = len(MEASURES), len(experiment.sets), len(MEASURES) * (0.4 * len(names) + 1)
    figure, grid = plt.subplots(rows, columns, figsize=(13, height), sharex="row", sharey=True, squeeze=False)
    full = _most_seeds(experiment)
    for row, (measure, title) in zip(grid, MEASURES.items(), strict=True):
        reach = 0.0  # of three seeds' intervals nothing else would be seen, so they may run out of the picture
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
                    if style == ":" or name in full:
                        reach = max(reach, abs(interval.low), abs(interval.high))
            axis.set_yticks(range(len(names)), [_with_base(experiment, n) for n in names])
            axis.set_title(f"{title}, {prompts}")
        if reach > 0:
            row[0].set_xlim(-1.1 * reach, 1.1 * reach)
    grid[0][0].invert_yaxis()
    figure.supxlabel(
        f"difference to {TITLES[BASELINE]}, 95 %: solid over seeds (it may go on at an edge), dotted over prompts",
        fontsize=9, color=GREY,
    )  # fmt: skip
    return figure


def _with_base(experiment: Experiment, name: str) -> str:
    base = experiment.base_of(name)
    return TITLES[name] if base == BASELINE else f"{TITLES[name]} (to {TITLES[base]})"


def _weights(experiment: Experiment) -> Figure:
    """Of every algorithm the shares by region of weight (dark) and of its tokens (pale), mean over steps and seeds."""
    import matplotlib.pyplot as plt

    names = list(experiment.policies)
    figure, axis = plt.subplots(figsize=(9, 0.6 * len(names) + 1.8))
    for offset, prefix, shade in ((-0.18, "weight_mass", 1.0), (0.18, "tokens", 0.45)):
        table = np.array([_share(experiment, name, prefix) for name in names])
        edges = np.cumsum(table, axis=1) - table
        for i, region in enumerate(REGIONS):
            at, title = np.arange(len(names)) + offset, REGION_TITLES[region] if shade == 1.0 else None
            colour = REGION_COLOURS[region]
            axis.barh(at, table[:, i], 0.33, left=edges[:, i], color=colour, alpha=shade, label=title)
    axis.set_yticks(range(len(names)), [TITLES[name] for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("by region (%), mean over steps and seeds: weight (dark), tokens (pale)")
    figure.legend(loc="outside upper center", ncols=len(REGIONS))
    return figure


def _share(experiment: Experiment, name: str, prefix: str) -> np.ndarray:
    shares = [run.shares(prefix) for run in experiment.runs_of(name)]
    return 100 * np.array([np.mean(np.nan_to_num([s[region] for s in shares])) for region in REGIONS])
