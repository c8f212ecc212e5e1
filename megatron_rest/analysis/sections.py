"""The text of a run's report, section by section: the page and the terminal show the same lines."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rest.analysis.before_after import read_compared
from megatron_rest.analysis.evaluations import evaluation_lines
from megatron_rest.analysis.evidence import evidence_lines
from megatron_rest.analysis.planned import planned_lines
from megatron_rest.analysis.series import REGIONS, RunMetrics
from megatron_rest.analysis.summary import format_value, learning_lines, phase_lines, table_lines

__all__ = ["mismatch_lines", "text_sections"]


def text_sections(run: RunMetrics) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of every section that the run has something for."""
    yield "What it learned", learning_lines(run)
    compared = [line for part in read_compared(run.run_dir) for line in (*part.lines(), "")]
    if compared:
        yield "Before and after, on prompts of a set (intervals over prompts)", compared[:-1]
    evaluation = evaluation_lines(run.run_dir)
    if evaluation:
        yield "Benchmarks", evaluation
    mismatch = mismatch_lines(run)
    if mismatch:
        yield "Rollout engine against trainer, by region", mismatch
    evidence = evidence_lines(run.run_dir)
    if evidence:
        yield "Variance of the policy gradient", evidence
    yield "Time", phase_lines(run)
    yield "Time against the plan", planned_lines(run)


def mismatch_lines(run: RunMetrics) -> list[str]:
    """|rollout - training log-prob| of each region's tokens, and of the first tokens, first steps and last."""
    rows = []
    for name in (*REGIONS, "first_token"):
        metric = f"mismatch/{name}"
        if run.has(metric):
            cells = [format_value(window.mean, -1) for window in (run.first(metric), run.last(metric))]
            rows.append([name.replace("_", " "), *cells])
    return table_lines(["mean |difference| of log-probs, nats", "first steps", "last steps"], rows) if rows else []
