"""PNG plots of one run or several: what it learned, where the weights went, where the time went.

One run: all regions share a panel, each with its own colour.  Several runs: one panel a region, each run with its own
colour, so that lines to compare lie on the same axes.  Raw steps are thin, their centred moving mean is thick; means of
the first and the last steps are bars over the steps they cover, their numbers stand over the panel.  A value that was
not finite leaves a gap and is counted in the title.  Colours are Okabe and Ito's, which colour-blind readers can tell
apart; runs also differ in line style.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rest.analysis.evidence import read_evidence
from megatron_rest.analysis.series import PHASES, REGIONS, WINDOW, RunMetrics
from megatron_rest.analysis.summary import own_rewards

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PLOTS", "moving_mean", "plot_runs"]

DPI = 130
GREY = "#666666"
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RUN_STYLES = ("-", "--", "-.", ":")
REGION_COLOURS = dict(zip(REGIONS, ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"), strict=True))
REGION_TITLES = dict(zip(REGIONS, ("format", "tool name", "tool arguments", "thinking", "response"), strict=True))
PHASE_COLOURS = dict(
    zip(
        PHASES,
        ("#0072B2", "#F0E442", "#56B4E9", "#CC79A7", "#D55E00", "#009E73", "#999999", "#000000", "#8B5A2B"),
        strict=True,
    )
)
VALIDATION = "validation/"
MARKER_STEPS = 25  # runs up to this many steps show every step as a dot
SMOOTH_FROM = 8  # steps from which on a moving mean says more than the dots


def plot_runs(runs: Sequence[RunMetrics], output_dir: str | Path) -> list[Path]:
    """Draw every plot that the runs have data for into ``output_dir``; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for name, draw in PLOTS.items():
            figure = draw(runs)
            if figure is None:
                continue
            figure.savefig(folder / f"{name}.png", dpi=DPI)
            plt.close(figure)
            written.append(folder / f"{name}.png")
    return written


STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.titlesize": 12,
    "font.size": 10,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
}


def reward(runs: Sequence[RunMetrics]) -> Figure | None:
    """Reward, its parts, and the two measures that do not depend on the schedule."""
    wanted = (
        ("reward/total", "Reward, total"),
        ("reward/format", "Reward, format part"),
        ("reward/correctness", "Reward, correctness part"),
        ("reward/static", "Reward without the schedule"),
        ("reward/accuracy", "Accuracy (0 to 1)"),
        ("reward/format_valid", "Rollouts with valid format (share)"),
        *((name, label.replace("reward", "Reward", 1)) for name, label, _ in own_rewards(runs)),
    )
    figure = _line_panels(runs, wanted, "mean over rollouts")
    if figure is not None:
        longest = max(len(run.rows) for run in runs)
        notes = [f"bars and numbers: mean of the first {WINDOW} and the last {WINDOW} steps"] * (longest >= 2 * WINDOW)
        notes += ["thick line: centred moving mean"] * (longest >= SMOOTH_FROM)
        figure.supxlabel("; ".join(notes), fontsize=9, color=GREY)
    return figure


def entropy(runs: Sequence[RunMetrics]) -> Figure | None:
    """Mean token entropy of each region."""
    return _by_region(runs, "Token entropy by region", "mean entropy (nats)", _entropy_series)


def weight_mass(runs: Sequence[RunMetrics]) -> Figure | None:
    """Share of the token weights that each region gets."""
    return _by_region(runs, "Weight mass by region", "share of all token weights (%)", _weight_series)


def phases(runs: Sequence[RunMetrics]) -> Figure | None:
    """Seconds of each step, stacked by phase; one panel a run."""
    timed = [run for run in runs if any(row["seconds"] for row in run.rows)]
    if not timed:
        return None
    figure, axes = _panels(len(timed), columns=min(len(timed), 2), width=9.0 if len(timed) == 1 else 5.5)
    for axis, run in zip(axes, timed, strict=True):
        _stack_phases(axis, run)
        axis.set_title(run.label if len(timed) > 1 else "Wall time of a step by phase")
        axis.set_ylabel("seconds")
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values())[::-1], list(handles)[::-1], loc="outside right upper")
    return figure


def mismatch(runs: Sequence[RunMetrics]) -> Figure | None:
    """Distance between the engine's and the trainer's log-probs of the same sampled tokens."""
    wanted = (
        ("mismatch/abs_log_prob_mean", "|rollout - train log-prob|, mean over tokens"),
        ("mismatch/abs_log_prob_max", "|rollout - train log-prob|, largest"),
    )
    figure = _line_panels(runs, wanted, "nats", marks=False)
    for axis in figure.axes if figure is not None else ():
        _log_or_zero(axis)
    return figure


def mismatch_by_region(runs: Sequence[RunMetrics]) -> Figure | None:
    """The same distance for the tokens of each region."""
    title, unit = "|rollout - train log-prob| by region", "mean over tokens (nats)"
    return _by_region(runs, title, unit, _mismatch_series, from_zero=False)


def variance_ratio(runs: Sequence[RunMetrics]) -> Figure | None:
    """Variance of the policy gradient under each weighting, over that under uniform weights (``variance.json``)."""
    measured = [(run, step) for run in runs for step in read_evidence(run.run_dir)]
    if not measured:
        return None
    names = list(dict.fromkeys(row["name"] for _, step in measured for row in step["variance"]))
    figure, [axis] = _panels(1, columns=1, width=9.0, height=0.25 * len(names) * len(measured) + 1.2)
    axis.axvline(1, color=GREY, linewidth=1)
    for i, (run, step) in enumerate(measured):
        rows = [row for row in step["variance"] if row["ratio"] is not None]
        places = [names.index(row["name"]) + 0.8 * ((i + 0.5) / len(measured) - 0.5) for row in rows]
        errors = [row["ratio_standard_error"] or 0.0 for row in rows]
        label = f"step {step['step']}" if len(runs) == 1 else f"{run.label}, step {step['step']}"
        colour = RUN_COLOURS[i % len(RUN_COLOURS)]
        axis.errorbar([row["ratio"] for row in rows], places, xerr=errors, fmt="o", color=colour, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_title("Variance of the policy gradient, ratio to uniform weights (+- one standard error)")
    figure.legend(loc="outside lower right", ncols=len(measured))
    return figure


def validation(runs: Sequence[RunMetrics]) -> Figure | None:
    """Scores of the validation steps by category."""
    names = dict.fromkeys(n for run in runs for row in run.rows for n in row["metrics"] if n.startswith(VALIDATION))
    return _line_panels(runs, [(n, n.removeprefix(VALIDATION)) for n in names], "", marks=False)


def response_length(runs: Sequence[RunMetrics]) -> Figure | None:
    """Length of the responses and how many were cut."""
    wanted = (
        ("response/length", "Response length (tokens)"),
        ("response/truncated", "Responses cut at the length limit (share)"),
    )
    return _line_panels(runs, wanted, "mean over rollouts", marks=False, from_zero=True)


def optimizer(runs: Sequence[RunMetrics]) -> Figure | None:
    """How hard the update pulls."""
    wanted = (
        ("optimizer/grad_norm", "Gradient norm before clipping"),
        ("loss/ratio", "Policy ratio, new to old, mean"),
        ("loss/policy", "Policy loss"),
    )
    return _line_panels(runs, wanted, "", marks=False)


PLOTS: dict[str, Callable[[Sequence[RunMetrics]], Any]] = {
    "reward": reward,
    "entropy": entropy,
    "weight_mass": weight_mass,
    "phases": phases,
    "mismatch": mismatch,
    "mismatch_by_region": mismatch_by_region,
    "variance_ratio": variance_ratio,
    "validation": validation,
    "response_length": response_length,
    "optimizer": optimizer,
}


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over ``width`` (odd) values, fewer at both ends; nan stays where it is and out of its neighbours."""
    half = width // 2
    out = np.full(len(values), np.nan)
    for i in range(len(values)):
        part = values[max(0, i - half) : i + half + 1]
        part = part[np.isfinite(part)]
        if len(part) and np.isfinite(values[i]):
            out[i] = part.mean()
    return out


def _smoothing_width(num_values: int) -> int:
    return max(3, num_values // 10 | 1)


def _panels(num: int, *, columns: int, width: float = 4.6, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    import matplotlib.pyplot as plt

    rows = -(-num // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.4), squeeze=False)
    axes = list(grid.flat)
    for axis in axes[num:]:
        axis.remove()
    return figure, axes[:num]


def _line_panels(
    runs: Sequence[RunMetrics],
    wanted: Sequence[tuple[str, str]],
    unit: str,
    *,
    marks: bool = True,
    from_zero: bool = False,
) -> Figure | None:
    """One panel a metric, one line a run; metrics that no run has are left out."""
    present = [(name, title) for name, title in wanted if any(run.has(name) for run in runs)]
    if not present:
        return None
    figure, axes = _panels(len(present), columns=min(len(present), 3))
    for axis, (name, title) in zip(axes, present, strict=True):
        broken = 0
        for i, run in enumerate(runs):
            steps, values = run.series(name)
            colour = RUN_COLOURS[i % len(RUN_COLOURS)]
            _line(axis, steps, values, colour, RUN_STYLES[i % len(RUN_STYLES)], run.label)
            if marks and len(run.rows) >= 2 * WINDOW:
                _mark_windows(axis, run, name, colour, place=i / max(len(runs), 2) if len(runs) <= 3 else None)
            broken += int(np.sum(~np.isfinite(values)))
        _finish(axis, title, unit, runs, broken)
        if marks:
            axis.set_title(axis.get_title(loc="left"), pad=20)
        if from_zero:
            axis.set_ylim(bottom=0)
    _run_legend(figure, axes, runs)
    return figure


def _by_region(
    runs: Sequence[RunMetrics],
    title: str,
    unit: str,
    series: Callable[[RunMetrics, str], tuple[np.ndarray, np.ndarray]],
    *,
    from_zero: bool = True,
) -> Figure | None:
    """One run: regions in one panel, named at the right end of their lines.  Several: one panel a region."""
    regions = [r for r in REGIONS if any(len(series(run, r)[1]) for run in runs)]
    if not regions:
        return None
    if len(runs) == 1:
        figure, [axis] = _panels(1, columns=1, width=8.0, height=4.2)
        broken = 0
        for region in regions:
            steps, values = series(runs[0], region)
            _line(axis, steps, values, REGION_COLOURS[region], "-", REGION_TITLES[region])
            broken += int(np.sum(~np.isfinite(values)))
        _finish(axis, title, unit, runs, broken)
        _scale(axis, from_zero)
        figure.legend(loc="outside right upper")
        return figure
    figure, axes = _panels(len(regions), columns=3)
    for axis, region in zip(axes, regions, strict=True):
        broken = 0
        for i, run in enumerate(runs):
            steps, values = series(run, region)
            style = RUN_STYLES[i % len(RUN_STYLES)]
            _line(axis, steps, values, RUN_COLOURS[i % len(RUN_COLOURS)], style, run.label)
            broken += int(np.sum(~np.isfinite(values)))
        _finish(axis, REGION_TITLES[region], unit, runs, broken)
        _scale(axis, from_zero)
    figure.suptitle(title, x=0.01, ha="left")
    _run_legend(figure, axes, runs)
    return figure


def _scale(axis: Axes, from_zero: bool) -> None:
    if from_zero:
        axis.set_ylim(bottom=0)
    else:
        _log_or_zero(axis)


def _mismatch_series(run: RunMetrics, region: str) -> tuple[np.ndarray, np.ndarray]:
    return run.series(f"mismatch/{region}")


def _entropy_series(run: RunMetrics, region: str) -> tuple[np.ndarray, np.ndarray]:
    return run.series(f"entropy/{region}")


def _weight_series(run: RunMetrics, region: str) -> tuple[np.ndarray, np.ndarray]:
    if not run.has(f"weight_mass/{region}"):
        return np.array([]), np.array([])
    return np.array(run.steps), 100 * run.shares("weight_mass")[region]


def _line(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str, style: str, label: str) -> None:
    """Few steps: a line with dots.  Many: thin raw line under its moving mean."""
    if not len(steps):
        return
    marker = "o" if steps[-1] - steps[0] < MARKER_STEPS else None
    if len(steps) < SMOOTH_FROM:
        axis.plot(steps, values, style, color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
        return
    axis.plot(steps, values, "-", color=colour, alpha=0.35, linewidth=0.9, marker=marker, markersize=2.5)
    smooth = moving_mean(values, _smoothing_width(len(values)))
    axis.plot(steps, smooth, style, color=colour, linewidth=2.0, label=label)


def _mark_windows(axis: Axes, run: RunMetrics, name: str, colour: str, *, place: float | None) -> None:
    """Horizontal bars at the means of the first and the last steps; their numbers over the panel, from ``place`` on."""
    first, last = run.first(name), run.last(name)
    beyond = max(0.4, 0.008 * (run.steps[-1] - run.steps[0]))  # so that bars can be seen in a run of hundreds of steps
    for window, covered in ((first, run.steps[:WINDOW]), (last, run.steps[-WINDOW:])):
        if np.isfinite(window.mean):
            axis.hlines(window.mean, covered[0] - beyond, covered[-1] + beyond, color=colour, linewidth=4, alpha=0.5)
    if place is not None and first.num_steps and last.num_steps:
        text = f"{first.mean:.3g} \N{RIGHTWARDS ARROW} {last.mean:.3g}"
        axis.text(place, 1.02, text, transform=axis.transAxes, color=colour, fontsize=9, fontweight="bold")


def _finish(axis: Axes, title: str, unit: str, runs: Sequence[RunMetrics], num_broken: int = 0) -> None:
    if num_broken:
        title += f" ({num_broken} value{'s' if num_broken > 1 else ''} not finite)"
    axis.set_title(title)
    place = axis.get_subplotspec()
    if place is not None and place.is_first_col():
        axis.set_ylabel(unit)
    axis.margins(y=0.12)
    _step_axis(axis, runs)


def _step_axis(axis: Axes, runs: Sequence[RunMetrics]) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("RL step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))
    axis.set_xlim(min(run.steps[0] for run in runs) - 0.6, max(run.steps[-1] for run in runs) + 0.6)


def _run_legend(figure: Figure, axes: Sequence[Axes], runs: Sequence[RunMetrics]) -> None:
    if len(runs) > 1:
        handles: dict[str, Any] = {}
        for axis in axes:  # a run may lack the metric of the first panel
            handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=min(len(handles), 4) or 1)


def _log_or_zero(axis: Axes) -> None:
    """A log axis when the values span more than a decade and none is zero; otherwise linear from zero."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > 10:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))


def _stack_phases(axis: Axes, run: RunMetrics) -> None:
    width = 0.9 if len(run.rows) <= 60 else 1.0  # gaps thinner than a pixel flicker
    steps = np.array(run.steps)
    bottom = np.zeros(len(steps))
    table = {phase: _phase_seconds(run, phase) for phase in PHASES}
    total = _phase_seconds(run, "total")
    for phase, seconds in table.items():
        if seconds.any():
            axis.bar(steps, seconds, bottom=bottom, width=width, color=PHASE_COLOURS[phase], label=phase, linewidth=0)
            bottom = bottom + seconds
    other = np.clip(total - bottom, 0, None)
    if other.any():
        axis.bar(steps, other, bottom=bottom, width=width, color="#BBBBBB", label="other", linewidth=0)
    _step_axis(axis, [run])
    axis.grid(visible=False, axis="x")


def _phase_seconds(run: RunMetrics, phase: str) -> np.ndarray:
    return np.array([row["seconds"].get(phase) or 0.0 for row in run.rows], dtype=float)
