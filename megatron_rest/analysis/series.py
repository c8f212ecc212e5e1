"""``metrics.jsonl`` read back: one line a step, one truth for console, report and comparison.

A line is ``{"step": 3, "policy_version": 3, "metrics": {name: number | null}, "seconds": {phase: number | null}}``
and, if a value was NaN or infinite, ``"nonfinite": [names]`` (the value itself is null: JSON has no NaN).  Three cases
are kept apart all the way to the reader's eye: a number, a value that was not finite (``nan`` here, and it spoils every
mean it is part of) and a metric the step does not have (left out: a region without tokens has no entropy).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

__all__ = [
    "METRICS_FILE",
    "PHASES",
    "REGIONS",
    "WINDOW",
    "MetricsFileError",
    "RunMetrics",
    "Window",
    "load_runs",
    "read_metrics",
    "scan_metrics",
]

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
REGIONS = ("format", "name", "args", "think", "response")  # as in entropy/{region}; the order of every table and plot
PHASES = ("rollout", "reward", "score", "weights", "update", "sync", "validation", "checkpoint", "wait")  # in order
WINDOW = 3  # "the first 3 steps against the last 3"


class MetricsFileError(ValueError):
    """A metrics file that cannot be read; the message says where and how to mend it."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines.  A half-written last one is left out with a warning.

    Raises :class:`MetricsFileError` with the line's number if one is damaged.
    """
    rows, complete_bytes = scan_metrics(path)
    num_bytes = os.path.getsize(path)
    if num_bytes > complete_bytes:
        logger.warning(
            "%s: line %d is half-written (%d bytes without a line end, as a kill leaves it) and was left out",
            path,
            len(rows) + 1,
            num_bytes - complete_bytes,
        )
    return rows


def scan_metrics(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The complete lines and how many bytes they take; what lies behind them is a half-written line."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise MetricsFileError(f"cannot read {path}: {error.strerror}; is it the folder of a training run?") from error
    complete = data.rfind(b"\n") + 1
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1):
        row = _parse(line, f"{path} line {number}")
        if rows and row["step"] <= rows[-1]["step"]:
            _damaged(f"{path} line {number}", f"step {row['step']} follows step {rows[-1]['step']}")
        rows.append(row)
    return rows, complete


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=lambda text: _damaged(where, f"{text} is not JSON"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        _damaged(where, str(error))
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        _damaged(where, 'it is not an object with an integer "step"')
    for part in ("metrics", "seconds"):
        values = row.get(part)
        if not isinstance(values, dict):
            _damaged(where, f'it has no object "{part}"')
        wrong = [k for k, v in values.items() if v is not None and type(v) not in (int, float)]
        if wrong:
            _damaged(where, f"{part}/{wrong[0]} is {values[wrong[0]]!r}, expected a number or null")
    return row


def _damaged(where: str, what: str) -> NoReturn:
    raise MetricsFileError(f"{where} is damaged: {what}. Mend or delete that line; the rest of the file is not trusted")


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Mean of a metric over some steps; the standard error comes from the spread of those steps."""

    mean: float  # nan if a value was not finite, or if there is none
    standard_error: float  # nan with fewer than two values
    num_steps: int  # steps that have the metric

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Window:
        """Of plain values; none gives nan."""
        n = len(values)
        mean = math.fsum(values) / n if n else math.nan
        error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        return cls(mean=mean, standard_error=error, num_steps=n)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMetrics:
    """One run: its label in legends and its rows."""

    label: str
    run_dir: Path
    rows: Sequence[Mapping[str, Any]]

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]

    def has(self, name: str) -> bool:
        """Whether any step has the metric."""
        return any(name in row["metrics"] for row in self.rows)

    def series(self, name: str, *, part: str = "metrics") -> tuple[np.ndarray, np.ndarray]:
        """Steps that have metric ``name`` and its values there (nan where it was not finite)."""
        found = [(row["step"], row[part][name]) for row in self.rows if name in row[part]]
        values = [math.nan if value is None else float(value) for _, value in found]
        return np.array([step for step, _ in found], dtype=np.int64), np.array(values, dtype=np.float64)

    def shares(self, prefix: str) -> dict[str, np.ndarray]:
        """``prefix/{region}`` of every step as shares of their sum; a region without tokens has 0."""
        table = np.array([[_number(row["metrics"].get(f"{prefix}/{r}", 0.0)) for r in REGIONS] for row in self.rows])
        table = table.reshape(len(self.rows), len(REGIONS))
        sums = table.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = np.where(sums > 0, table / sums, math.nan)
        return {region: shares[:, i] for i, region in enumerate(REGIONS)}

    def first(self, name: str, num_steps: int = WINDOW) -> Window:
        """Mean over the first steps of the run."""
        return self._window(name, self.rows[:num_steps])

    def last(self, name: str, num_steps: int = WINDOW) -> Window:
        """Mean over the last steps of the run."""
        return self._window(name, self.rows[-num_steps:])

    def _window(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Window:
        return Window.of([_number(row["metrics"][name]) for row in rows if name in row["metrics"]])


def load_runs(run_dirs: Sequence[str | Path]) -> list[RunMetrics]:
    """Runs in the order given, labelled by the shortest path tails that tell them apart."""
    paths = [Path(d) for d in run_dirs]
    labels = _labels(paths)
    runs = []
    for path, label in zip(paths, labels, strict=True):
        if not path.is_dir():
            raise MetricsFileError(
                f"{path} is not a folder: give the run_dir of a training run (it holds {METRICS_FILE})"
            )
        rows = read_metrics(path / METRICS_FILE)
        if not rows:
            raise MetricsFileError(f"{path / METRICS_FILE} holds no complete step yet: wait for the first step to end")
        runs.append(RunMetrics(label=label, run_dir=path, rows=rows))
    return runs


def _labels(paths: Sequence[Path]) -> list[str]:
    parts = [p.resolve().parts for p in paths]
    if len(set(parts)) < len(parts):
        raise MetricsFileError(f"the same run is given twice: {', '.join(map(str, paths))}")
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
