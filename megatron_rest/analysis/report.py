"""A run on paper: the summary table and PNG plots from ``metrics.jsonl``, of one run or of several on the same axes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rest.analysis.evidence import evidence_lines
from megatron_rest.analysis.series import MetricsFileError, load_runs
from megatron_rest.analysis.summary import summary_lines

__all__ = ["COMPARED_DIR", "PLOTS_DIR", "main", "write_report"]

PLOTS_DIR = "plots"
COMPARED_DIR = "plots_compared"  # several runs on the same axes: never over the plots of one


def write_report(run_dirs: Sequence[str | Path], output_dir: str | Path | None = None) -> tuple[list[str], list[Path]]:
    """Plots into ``output_dir`` (default: in the first run's folder); returns the text and the files.

    Raises :class:`MetricsFileError` before anything is written if one of the runs cannot be read.
    """
    runs = load_runs(run_dirs)
    from megatron_rest.analysis.plots import plot_runs

    files = plot_runs(runs, output_dir or runs[0].run_dir / (PLOTS_DIR if len(runs) == 1 else COMPARED_DIR))
    lines: list[str] = []
    for run in runs:
        evidence = evidence_lines(run.run_dir)
        lines += [*summary_lines(run), "", *evidence, *([""] if evidence else [])]
    return lines, files


def main(argv: Sequence[str] | None = None) -> int:
    """``megatron-rest report RUN_DIR [RUN_DIR2 ...] [--output DIR]``."""
    parser = argparse.ArgumentParser(prog="megatron-rest report", description="Summary table and PNG plots of runs.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder that holds metrics.jsonl")
    parser.add_argument("--output", type=Path, help=f"folder for the plots (default: RUN_DIR/{PLOTS_DIR})")
    parser.add_argument("--no-summary", action="store_true", help="plots only: the run has printed its table already")
    args = parser.parse_args(argv)
    try:
        lines, files = write_report(args.run_dirs, args.output)
    except MetricsFileError as error:
        print(f"megatron-rest report: {error}", file=sys.stderr)
        return 2
    if not args.no_summary:
        print("\n".join(lines))
    for path in files:
        print(path)
    return 0
