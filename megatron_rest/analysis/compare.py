"""Runs side by side: what each reached, how far apart they are, and what that does not show.

Groups of runs that differ in their seeds are compared in ``groups.py``; here are two single runs.

The standard errors come from the spread of single steps.  They say how well a mean over a few noisy steps is known, not
how another seed would have gone: steps of one run share their start, their data order and each other's updates.  One
seed a side is therefore never called evidence here, however large the difference looks.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rest.analysis.configuration import different_settings
from megatron_rest.analysis.groups import group_lines, load_groups
from megatron_rest.analysis.report import COMPARED_DIR
from megatron_rest.analysis.series import WINDOW, MetricsFileError, RunMetrics, Window
from megatron_rest.analysis.summary import LEARNING_METRICS, format_value, table_lines

__all__ = ["Difference", "compare_lines", "difference", "main"]

ONE_SEED = (
    "One seed a side is not evidence.",
    "+- is one standard error from the spread of steps inside these two runs; the spread between seeds is not in it.",
    "Repeat both with at least 3 seeds before you claim a difference.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One metric of run A against run B."""

    metric: str
    first_a: Window
    last_a: Window
    first_b: Window
    last_b: Window
    last: float  # B - A, mean of the last steps
    last_error: float  # standard error of it, the two windows taken as independent
    paired: Window  # B - A step by step, over the steps that both runs have


def difference(a: RunMetrics, b: RunMetrics, metric: str) -> Difference:
    """Compare one metric."""
    last_a, last_b = a.last(metric), b.last(metric)
    steps_a, values_a = a.series(metric)
    steps_b, values_b = b.series(metric)
    _, at_a, at_b = np.intersect1d(steps_a, steps_b, assume_unique=True, return_indices=True)
    return Difference(
        metric=metric,
        first_a=a.first(metric),
        last_a=last_a,
        first_b=b.first(metric),
        last_b=last_b,
        last=last_b.mean - last_a.mean,
        last_error=math.hypot(last_a.standard_error, last_b.standard_error),
        paired=Window.of(values_b[at_b] - values_a[at_a]),
    )


def compare_lines(a: RunMetrics, b: RunMetrics) -> list[str]:
    """The table, and what it does not show."""
    rows = []
    for metric, label, decimals in LEARNING_METRICS:
        if not (a.has(metric) and b.has(metric)):
            continue
        d = difference(a, b, metric)
        plain = [format_value(w.mean, decimals) for w in (d.first_a, d.last_a, d.first_b, d.last_b)]
        last = _with_error(d.last, d.last_error, decimals)
        rows.append([label, *plain, last, _with_error(d.paired.mean, d.paired.standard_error, decimals)])
    header = ["mean over steps", f"A first {WINDOW}", f"A last {WINDOW}", f"B first {WINDOW}", f"B last {WINDOW}"]
    header += [f"B - A, last {WINDOW}", "B - A, all common steps"]
    only = [_only(a, b, "A"), _only(b, a, "B")]
    return [
        f"A = {a.label} ({len(a.rows)} steps)   B = {b.label} ({len(b.rows)} steps)",
        "",
        *table_lines(header, rows),
        "",
        *(text for text in only if text),
        *_unequal_length(a, b),
        *_settings(a, b),
        *ONE_SEED,
    ]


_EPILOG = """\
examples:
  megatron-rest compare runs/grpo runs/rest                          two runs, step by step
  megatron-rest compare 'runs/grpo/seed-*' 'runs/rest/seed-*'        groups, paired by trainer.seed: intervals
  megatron-rest compare runs/grpo runs/rest runs/otb                 folders of runs; the first is the baseline
"""


def main(argv: Sequence[str] | None = None) -> int:
    """``megatron-rest compare GROUP GROUP [GROUP ...] [--output DIR]``."""
    parser = argparse.ArgumentParser(
        prog="megatron-rest compare",
        description="Runs, or groups of runs with different seeds, side by side: table and plots.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "groups", nargs="+", metavar="GROUP",
        help="a run folder (holds metrics.jsonl), a quoted pattern, or a folder that holds some; the first: baseline",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder for the PNG overlays (default: FIRST RUN/plots_compared)")
    args = parser.parse_args(argv)
    try:
        if len(args.groups) < 2:
            raise MetricsFileError("give two runs or groups of runs at least; quote patterns")
        groups = load_groups(args.groups)
    except MetricsFileError as error:
        print(f"megatron-rest compare: {error}", file=sys.stderr)
        return 2
    runs = [run.run for group in groups for run in group.runs]
    if len(groups) == len(runs) == 2:
        print("\n".join(compare_lines(*runs)))
    else:
        print("\n".join(group_lines(groups)))
    from megatron_rest.analysis.plots import plot_runs

    print()
    for path in plot_runs(runs, args.output or runs[0].run_dir / COMPARED_DIR):
        print(path)
    return 0


def _settings(a: RunMetrics, b: RunMetrics) -> list[str]:
    rows = [[key, *values] for key, values in different_settings([a.run_dir, b.run_dir])]
    return [*table_lines(["setting that differs", "A", "B"], rows), ""] if rows else []


def _with_error(value: float, error: float, decimals: int) -> str:
    text = format_value(value, decimals, sign=True)
    return text if math.isnan(error) else f"{text} +- {format_value(error, decimals)}"


def _only(one: RunMetrics, other: RunMetrics, name: str) -> str:
    found = [metric for metric, _, _ in LEARNING_METRICS if one.has(metric) and not other.has(metric)]
    return f"Only in {name}: {', '.join(found)}" if found else ""


def _unequal_length(a: RunMetrics, b: RunMetrics) -> list[str]:
    if a.steps[-1] == b.steps[-1]:
        return []
    return [
        f"A ends at step {a.steps[-1]}, B at step {b.steps[-1]}: their last {WINDOW} steps are not at the same point "
        "of training; the last column compares equal steps."
    ]
