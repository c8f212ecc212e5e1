"""The text of a run's report, section by section: the page and the terminal show the same lines."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_rest.analysis.before_after import read_compared
from megatron_rest.analysis.configuration import configuration_lines
from megatron_rest.analysis.evaluations import evaluation_lines
from megatron_rest.analysis.evidence import evidence_lines
from megatron_rest.analysis.metric_table import find_metric
from megatron_rest.analysis.planned import planned_lines
from megatron_rest.analysis.series import REGIONS, WINDOW, RunMetrics
from megatron_rest.analysis.summary import format_value, learning_lines, phase_lines, table_lines

__all__ = ["explained_lines", "mismatch_lines", "text_sections"]


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
    profiles = sorted((run.run_dir / "profile").glob("*.json.gz"))
    if profiles:
        yield "Traces", [f"{path} (open in Perfetto or chrome://tracing)" for path in profiles]
    configuration = configuration_lines(run.run_dir)
    if configuration:
        yield "Configuration", configuration


def explained_lines(run: RunMetrics) -> list[str]:
    """Every number that the run has, first steps and last, with its unit and what it is."""
    rows = []
    for part, prefix in (("metrics", ""), ("seconds", "seconds/")):
        for name in dict.fromkeys(name for row in run.rows for name in row[part]):
            values = run.series(name, part=part)[1]
            known = find_metric(prefix + name)
            said = [known.unit, known.meaning] if known is not None else ["", "not in the table of metrics"]
            cells = [f"{float(np.mean(some)):.4g}" for some in (values[:WINDOW], values[-WINDOW:])]
            rows.append([prefix + name, *cells, *said])
    return table_lines(["key", "first steps", "last steps", "unit", "what it is"], sorted(rows))


def mismatch_lines(run: RunMetrics) -> list[str]:
    """|rollout - training log-prob| of each region's tokens, and of the first tokens, first steps and last."""
    rows = []
    for name in (*REGIONS, "first_token"):
        metric = f"mismatch/{name}"
        if run.has(metric):
            cells = [format_value(window.mean, -1) for window in (run.first(metric), run.last(metric))]
            rows.append([name.replace("_", " "), *cells])
    return table_lines(["mean |difference| of log-probs, nats", "first steps", "last steps"], rows) if rows else []
