"""The table at the end of a run: did it learn (first steps against last), where the time went, where the files are.

Every number is computed from the rows of ``metrics.jsonl`` and from nothing else, except the peak memory of all
processes, which the caller measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rest.analysis.series import METRICS_FILE, PHASES, REGIONS, WINDOW, RunMetrics, Window

__all__ = [
    "LEARNING_METRICS",
    "TableLine",
    "duration",
    "format_value",
    "learning_lines",
    "own_rewards",
    "phase_lines",
    "summary_lines",
    "table_lines",
]

# (metric, what people read, decimals or -1 for scientific), in table order; metrics a run does not have are left out.
LEARNING_METRICS: tuple[tuple[str, str, int], ...] = (
    ("reward/total", "reward, total", 3),
    ("reward/static", "reward without the schedule", 3),
    ("reward/format", "reward, format", 3),
    ("reward/correctness", "reward, correctness", 3),
    ("reward/accuracy", "accuracy (0 to 1)", 3),
    ("reward/format_valid", "valid format (share)", 3),
    ("response/length", "response length (tokens)", 1),
    ("response/truncated", "truncated (share)", 3),
    ("entropy/all", "entropy, all (nats)", 3),
    *((f"entropy/{region}", f"entropy, {region} (nats)", 3) for region in REGIONS),
    ("mismatch/abs_log_prob_mean", "|rollout - train log-prob| (nats)", -1),
)


def own_rewards(runs: Sequence[RunMetrics]) -> list[tuple[str, str, int]]:
    """Further numbers of rewards that runs have: terms, what rewards of one's own say, answers without a judgement."""
    known = {name for name, _, _ in LEARNING_METRICS}
    rows = [row["metrics"] for run in runs for row in run.rows]
    names = {name for values in rows for name in values if name.startswith("reward/")}
    if not any(values.get("reward/not_judged") for values in rows):  # the rule: nothing to tell, or to draw
        names.discard("reward/not_judged")
    return [(name, name.replace("reward/", "reward, "), 3) for name in sorted(names - known)]


class TableLine(str):
    """A line of an aligned table that still knows its cells: pages make a real table of it."""

    cells: tuple[str, ...]
    is_header: bool
    is_rule: bool

    def __new__(cls, text: str, cells: Sequence[str], *, is_header: bool = False, is_rule: bool = False) -> TableLine:
        line = super().__new__(cls, text)
        line.cells, line.is_header, line.is_rule = tuple(cells), is_header, is_rule
        return line


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned plain-text columns (:class:`TableLine`): the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *others]).rstrip()

    rule = TableLine("  ".join("-" * w for w in widths), (), is_rule=True)
    return [TableLine(line(header), header, is_header=True), rule, *(TableLine(line(row), row) for row in rows)]


def learning_lines(run: RunMetrics) -> list[str]:
    """Mean of the first and the last steps, and the change."""
    rows = []
    for name, label, decimals in [*LEARNING_METRICS, *own_rewards([run])]:
        if run.has(name):
            first, last = run.first(name), run.last(name)
            change = last.mean - first.mean
            rows.append(
                [label, _mean(first, decimals), _mean(last, decimals), format_value(change, decimals, sign=True)]
            )
    n = min(WINDOW, len(run.rows))
    lines = table_lines(["mean over steps", f"first {n}", f"last {n}", "change"], rows)
    if len(run.rows) < 2 * WINDOW:
        lines.append(f"(only {len(run.rows)} steps: first and last overlap, the change means little)")
    return lines


def phase_lines(run: RunMetrics) -> list[str]:
    """Seconds by phase over the whole run; what no phase claims is shown as ``other``."""
    names = {name for row in run.rows for name in row["seconds"]} - {"total"}
    ordered = [p for p in PHASES if p in names] + sorted(names - set(PHASES))
    sums = {name: math.fsum(run.series(name, part="seconds")[1]) for name in ordered}
    total = math.fsum(run.series("total", part="seconds")[1])
    if total > 0:
        sums["other"] = total - math.fsum(sums.values())
        sums["total"] = total
    whole = total or math.fsum(sums.values())
    rows = [
        [name, f"{s:.1f}", f"{s / len(run.rows):.2f}", f"{100 * s / whole:.1f} %" if whole > 0 else "-"]
        for name, s in sums.items()
    ]
    return table_lines(["phase", "seconds", "a step", "share"], rows)


def summary_lines(
    run: RunMetrics, *, peak_memory_bytes: int | None = None, files: Mapping[str, str | Path] | None = None
) -> list[str]:
    """The whole summary.  ``files`` are further outputs by name; metrics and TensorBoard are named without asking."""
    seconds = math.fsum(run.series("total", part="seconds")[1])
    lines = [
        f"{run.run_dir}: steps {run.steps[0]} to {run.steps[-1]} ({len(run.rows)} steps, {duration(seconds)})",
        "",
        *learning_lines(run),
        "",
        *phase_lines(run),
        "",
    ]
    if peak_memory_bytes is not None:
        lines.append(f"peak memory, all processes: {peak_memory_bytes / 2**30:.2f} GiB")
    lines += _nonfinite_lines(run)
    known: dict[str, str | Path] = {"metrics": run.run_dir / METRICS_FILE, "tensorboard": run.run_dir / "tensorboard"}
    named = {name: path for name, path in known.items() if Path(path).exists()} | dict(files or {})
    width = max((len(name) for name in named), default=0)
    return lines + [f"{name:<{width}}  {path}" for name, path in named.items()]


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    if not math.isfinite(seconds):
        return str(seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_value(value: float, decimals: int, *, sign: bool = False) -> str:
    """``decimals`` digits after the point, or three significant ones with an exponent if it is -1."""
    digits = f".{decimals}f" if decimals >= 0 else ".2e"
    return f"{value:{'+' if sign else ''}{digits}}"


def _nonfinite_lines(run: RunMetrics) -> list[str]:
    counts: dict[str, list[int]] = {}
    for row in run.rows:
        for name in row.get("nonfinite", ()):
            counts.setdefault(name, []).append(row["step"])
    return [f"NOT FINITE: {name} in {len(s)} step(s), first in step {s[0]}" for name, s in counts.items()]


def _mean(window: Window, decimals: int) -> str:
    return format_value(window.mean, decimals) if window.num_steps else "-"
