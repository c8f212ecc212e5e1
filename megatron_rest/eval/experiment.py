"""What came out of ``make experiment``: tables with intervals and figures, from the files of the runs alone.

python -m megatron_rest.eval.experiment runs/experiment

Reads ``ALGORITHM/seed-N/{config.yaml, metrics.jsonl, prompt_sets.json}`` of every finished run, its ``benchmarks.json``
and ``variance.json`` where there are any, and the same of ``base/warm-start``; writes ``results.md``, ``results.json``
and ``plots/*.png`` into the same folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_rest.analysis.series import MetricsFileError
from megatron_rest.analysis.statistics import Interval
from megatron_rest.eval.benchmark_scores import benchmark_lines, benchmark_outcomes
from megatron_rest.eval.experiment_plots import plot_experiment
from megatron_rest.eval.outcomes import (
    BASELINE,
    MEASURES,
    SETS,
    TITLES,
    Experiment,
    Outcome,
    measured_variances,
    outcomes,
    read_experiment,
)
from megatron_rest.eval.scoring import write_json, write_text
from megatron_rest.eval.training_tables import entropy_lines, training_lines, tuning_lines
from megatron_rest.eval.verdicts import verdict_lines, verdicts

__all__ = ["main", "table_lines", "variance_lines"]


def table_lines(experiment: Experiment, results: Sequence[Outcome]) -> list[str]:
    """Markdown: one table a set and measure."""
    lines: list[str] = []
    for prompts in experiment.sets:
        what = SETS[prompts]
        count = len(next(iter(experiment.start[prompts].values())))
        lines += [f"## {what[0].upper()}{what[1:]} ({count})", ""]
        for measure, title in MEASURES.items():
            rows = [r for r in results if r.prompts == prompts and r.measure == measure]
            lines += [
                f"| {title} (warm start {rows[0].start:.3f}) | mean over seeds | each seed "
                "| - baseline, 95 % over seeds | - baseline, 95 % over prompts |",
                "|---|---|---|---|---|",
                *(_row(r) for r in rows),
                "",
            ]
    if experiment.left_out:
        few = ", ".join(f"{TITLES[name]} ({count})" for name, count in experiment.left_out.items())
        lines += [f"Left out, with fewer than the two seeds that an interval needs: {few}.", ""]
    return lines


def _row(result: Outcome) -> str:
    other = "" if result.base == BASELINE else f" (baseline: {TITLES[result.base]})"
    cells = [TITLES[result.algorithm] + other, f"{result.mean:.3f}", ", ".join(f"{v:.3f}" for v in result.by_seed)]
    cells += [_interval(result.difference_over_seeds), _interval(result.difference_over_prompts)]
    return f"| {' | '.join(cells)} |"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else str(interval)


def variance_lines(experiment: Experiment) -> list[str]:
    """Markdown: variance of the policy gradient as ratio to uniform weights, and where it lies, by run and step."""
    measured = measured_variances(experiment)
    if not measured:
        return []
    names = [str(row["name"]) for row in measured[0].step["variance"]][1:]  # the first is uniform weights
    lines = [
        "## Variance of the policy gradient",
        "",
        "Ratio to uniform weights on the same rollouts, with one standard error (prompts as units).",
        "",
        f"| run | step | rollouts | prompts | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    for one in measured:
        rows = {row["name"]: row for row in one.step["variance"]}
        cells = [f"{rows[n]['ratio']:.2f} +- {rows[n]['ratio_standard_error']:.2f}" if n in rows else "" for n in names]
        counts = f"{one.step['step']} | {one.step['num_sequences']} | {one.step['num_groups']}"
        lines.append(f"| {one.title} | {counts} | {' | '.join(cells)} |")
    lines += [
        "",
        "| run | step | region | entropy (nats) | of squared gradients | of tokens |",
        "|---|---|---|---|---|---|",
    ]
    for one in measured:
        for region, shares in one.step.get("gradient", {}).items():
            entropy = one.step["entropy"]["regions"][region]["entropy"]
            lines.append(
                f"| {one.title} | {one.step['step']} | {region} | {entropy:.3f} | {shares['of_squares']:.1%} "
                f"| {shares['of_tokens']:.1%} |"
            )
    return [*lines, ""]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what make experiment wrote")
    args = parser.parse_args(argv)
    try:
        experiment = read_experiment(args.folder)
        benchmarks = benchmark_outcomes(experiment)
        training = [*training_lines(experiment), *entropy_lines(experiment), *tuning_lines(args.folder)]
    except (ValueError, OSError, MetricsFileError) as error:
        print(f"megatron_rest.eval.experiment: {error}", file=sys.stderr)
        return 2
    results = outcomes(experiment)
    found = verdicts(experiment)
    lines = ["# The report of the runs", "", "All tables; edit none by hand.", ""]
    lines += [*verdict_lines(found), *table_lines(experiment, results), *training]
    lines += [*benchmark_lines(benchmarks), *variance_lines(experiment)]
    report = {
        "verdicts": [asdict(v) for v in found],
        "outcomes": [asdict(r) for r in results],
        "benchmarks": [asdict(b) for b in benchmarks],
    }
    write_json(args.folder / "results.json", {"seeds": experiment.seeds, **report})
    write_text(args.folder / "results.md", "\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))
    for path in plot_experiment(experiment, results, args.folder / "plots"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
