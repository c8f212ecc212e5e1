"""A run on paper: summary table, PNG plots and one HTML page from a run's files, or several runs on the same axes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rest.analysis.evidence import evidence_lines
from megatron_rest.analysis.page import PAGE_FILE, write_page
from megatron_rest.analysis.series import MetricsFileError, load_runs
from megatron_rest.analysis.summary import summary_lines

__all__ = ["COMPARED_DIR", "PLOTS_DIR", "main", "write_report"]

PLOTS_DIR = "plots"
COMPARED_DIR = "plots_compared"  # several runs on the same axes: never over the plots of one


def write_report(
    run_dirs: Sequence[str | Path], output_dir: str | Path | None = None, *, tokenizer: str | Path | None = None
) -> tuple[list[str], list[Path]]:
    """Plots into ``output_dir`` (default: in the first run's folder), and the page of a single run beside its metrics.

    Returns the text and the files.  Raises :class:`MetricsFileError` before anything is written if a run cannot be
    read.
    """
    runs = load_runs(run_dirs)
    from megatron_rest.analysis.plots import plot_runs

    files = plot_runs(runs, output_dir or runs[0].run_dir / (PLOTS_DIR if len(runs) == 1 else COMPARED_DIR))
    if len(runs) == 1:
        page = Path(output_dir or runs[0].run_dir) / PAGE_FILE
        files.append(write_page(runs[0], files, page, tokenizer=_tokenizer(runs[0].run_dir, tokenizer)))
    lines: list[str] = []
    for run in runs:
        evidence = evidence_lines(run.run_dir)
        lines += [*summary_lines(run), "", *evidence, *([""] if evidence else [])]
    return lines, files


def _tokenizer(run_dir: Path, folder: str | Path | None) -> Any:
    """The policy's tokenizer: of ``folder``, else of the run's exported model; None where there is none."""
    path = Path(folder or run_dir / "hf") / "tokenizer.json"
    if not path.is_file():
        if folder:
            raise MetricsFileError(f"--tokenizer: {folder} has no tokenizer.json")
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    return _Vocabulary(Tokenizer.from_file(str(path)))


class _Vocabulary:
    """A ``tokenizers.Tokenizer`` with the two questions that a Hugging Face tokenizer answers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def get_vocab(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()}


def main(argv: Sequence[str] | None = None) -> int:
    """``megatron-rest report RUN_DIR [RUN_DIR2 ...] [--text] [--output DIR] [--tokenizer DIR]``."""
    parser = argparse.ArgumentParser(
        prog="megatron-rest report",
        description="Table, PNG plots and one HTML page of a run; plots of several.",
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder that holds metrics.jsonl")
    parser.add_argument("--output", type=Path, help=f"folder of the files (default: RUN_DIR, plots in {PLOTS_DIR}/)")
    parser.add_argument("--tokenizer", type=Path, help="HF folder, to show sample rollouts (default: RUN_DIR/hf)")
    parser.add_argument("--text", action="store_true", help="the page in this terminal; writes no file")
    parser.add_argument("--no-summary", action="store_true", help="files only: the run has printed its table already")
    args = parser.parse_args(argv)
    if args.text:
        return _print_text(args.run_dirs, args.tokenizer)
    try:
        lines, files = write_report(args.run_dirs, args.output, tokenizer=args.tokenizer)
    except MetricsFileError as error:
        print(f"megatron-rest report: {error}", file=sys.stderr)
        return 2
    if not args.no_summary:
        print("\n".join(lines))
    for path in files:
        print(path)
    return 0


def _print_text(run_dirs: Sequence[Path], tokenizer: Path | None) -> int:
    from megatron_rest.analysis.terminal import terminal_lines

    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    try:
        for run in load_runs(run_dirs):
            print(f"{run.label}: steps {run.steps[0]} to {run.steps[-1]}, {len(run.rows)} in all\n")
            for line in terminal_lines(run, _tokenizer(run.run_dir, tokenizer), is_coloured=is_coloured):
                print(line)
    except MetricsFileError as error:
        print(f"megatron-rest report: {error}", file=sys.stderr)
        return 2
    return 0
