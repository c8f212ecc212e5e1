"""Figures of the experiment: how training went, what the differences are worth, where the weights lay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_rest.analysis.plots import DPI, GREY, REGION_COLOURS, REGION_TITLES, RUN_COLOURS, STYLE
from megatron_rest.analysis.series import REGIONS
from megatron_rest.eval.outcomes import BASELINE, MEASURES, TITLES, Experiment, Outcome, pass_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_experiment"]

_CURVES = {
    "reward/static": "reward without schedule",
    "reward/accuracy": "accuracy (0 to 1)",
    "reward/format_valid": "valid format (share)",
    "entropy/all": "entropy (nats)",
}
_COLOURS = dict(zip(TITLES, cycle(RUN_COLOURS), strict=False))


def plot_experiment(experiment: Experiment, results: Sequence[Outcome], output: Path) -> list[Path]:
    """Write the figures into ``output``; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for name, figure in {
            "training": _training(experiment),
            "differences": _differences(experiment, results),
            "weights": _weights(experiment),
        }.items():
            figure.savefig(output / f"{name}.png", dpi=DPI)
            plt.close(figure)
            written.append(output / f"{name}.png")
    return written


def _training(experiment: Experiment) -> Figure:
    """Mean over the seeds shared with the baseline, smoothed over one pass over the prompts; single seeds are thin."""
    import matplotlib.pyplot as plt

    width = pass_steps(experiment)
    figure, grid = plt.subplots(2, 2, figsize=(11, 7))
    for axis, (metric, title) in zip(grid.flat, _CURVES.items(), strict=True):
        for name, policies in experiment.policies.items():
            rows = [p.run.series(metric) for p in policies if p.seed in experiment.seeds_of(name)]
            smooth = np.array([_trailing(values, width) for _, values in rows])
            for line in smooth:
                axis.plot(rows[0][0], line, color=_COLOURS[name], alpha=0.25, linewidth=0.8)
            axis.plot(rows[0][0], smooth.mean(axis=0), color=_COLOURS[name], linewidth=2, label=TITLES[name])
        axis.set_title(title)
        axis.set_xlabel("RL step")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.supxlabel(
        "thick: mean over seeds; thin: each seed"
        + (f"; mean of the last {width} steps, in which every prompt is asked once" if width > 1 else ""),
        fontsize=9, color=GREY,
    )  # fmt: skip
    return figure


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
