"""What a step measured, on disk before the next one starts: ``metrics.jsonl`` and TensorBoard events.

A line is written by one ``write`` and synced: after a kill the file holds complete lines and at most one half-written
last one, which readers report and :class:`MetricsWriter` cuts off before it appends.  NaN and infinity become null and
are named in ``"nonfinite"``, so a run that breaks says so in a file any JSON reader takes.  One process writes (the
rank that reports); sums and counts travel to it in :class:`SumCount`, and the one division happens there.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

from megatron_rest.analysis.series import METRICS_FILE, MetricsFileError, read_metrics, scan_metrics

if TYPE_CHECKING:
    from megatron_rest.types import StepReport

__all__ = ["METRICS_FILE", "MetricsFileError", "MetricsWriter", "PhaseTimer", "SumCount", "read_metrics"]

logger = logging.getLogger(__name__)

TENSORBOARD_DIR = "tensorboard"


class MetricsWriter:
    """Appends step reports to ``<run_dir>/metrics.jsonl`` and ``<run_dir>/tensorboard``.

    A run continued from a checkpoint calls :meth:`resume` first, so that steps done twice are in the file once.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool = True) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.tensorboard_dir = Path(run_dir) / TENSORBOARD_DIR
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step: int | None = None  # newest step in the file
        self._events: Any = None
        self._summary_writer = _tensorboard_writer_class() if tensorboard else None
        if self.path.exists():
            self._keep(None)

    def write(self, report: StepReport) -> None:
        """Append one line (complete and on disk, or not there at all), then the TensorBoard scalars."""
        if self.last_step is not None and report.step <= self.last_step:
            raise ValueError(
                f"step {report.step} comes after step {self.last_step} in {self.path}: call resume({report.step - 1}) "
                "to continue that run from a checkpoint, or choose a new run_dir"
            )
        _append_line(self.path, _encode(report))
        self.last_step = report.step
        self._write_events(report)

    def amend(self, report: StepReport) -> None:
        """Replace the last line, atomically: its step took longer than was known when it was written."""
        if report.step != self.last_step:
            raise ValueError(f"step {report.step} is not the last of {self.path}, which is {self.last_step}")
        data = self.path.read_bytes()
        last = data.rstrip(b"\n").rfind(b"\n") + 1
        before = json.loads(data[last:])
        _replace(self.path, data[:last] + _encode(report))
        new = {name: s for name, s in report.seconds.items() if s != before["seconds"].get(name)}
        self._write_events(replace(report, metrics={}, seconds=new))

    def resume(self, step: int) -> None:
        """Drop every line after ``step``, atomically; TensorBoard hides the same steps."""
        self.close()
        if self.path.exists():
            self._keep(step)

    def close(self) -> None:
        """Close the TensorBoard file; a later write opens a new one."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self, step: int | None) -> None:
        """Rewrite the file without a half-written tail and, if ``step`` is given, without later steps."""
        rows, complete = scan_metrics(self.path)
        data = self.path.read_bytes()
        if len(data) > complete:
            logger.warning("%s: cut off a half-written line of %d bytes", self.path, len(data) - complete)
        lines = [line + b"\n" for line in data[:complete].split(b"\n")[:-1]]
        num_kept = sum(step is None or row["step"] <= step for row in rows)
        if num_kept < len(rows):
            logger.warning("%s: dropped the %d steps after step %s", self.path, len(rows) - num_kept, step)
        kept = b"".join(lines[:num_kept])
        if kept != data:
            _replace(self.path, kept)
        self.last_step = rows[num_kept - 1]["step"] if num_kept else None

    def _write_events(self, report: StepReport) -> None:
        if self._summary_writer is None:
            return
        if self._events is None:  # purge_step: TensorBoard hides what an earlier, killed process wrote from here on
            self._events = self._summary_writer(str(self.tensorboard_dir), purge_step=report.step)
        for name, value in report.metrics.items():
            self._events.add_scalar(name, float(value), report.step)
        for phase, seconds in report.seconds.items():
            self._events.add_scalar(f"seconds/{phase}", float(seconds), report.step)
        self._events.flush()


def _tensorboard_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"TensorBoard events need torch and tensorboard ({error}): pip install 'megatron_rest[train]', "
            "or MetricsWriter(..., tensorboard=False) for metrics.jsonl alone"
        ) from error
    return SummaryWriter


def _encode(report: StepReport) -> bytes:
    nonfinite: list[str] = []

    def plain(values: Mapping[str, float], prefix: str) -> dict[str, float | None]:
        nonfinite.extend(prefix + name for name, value in values.items() if not math.isfinite(value))
        return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}

    row: dict[str, Any] = {"step": report.step, "policy_version": report.policy_version}
    row["metrics"] = plain(report.metrics, "")
    row["seconds"] = plain(report.seconds, "seconds/")
    if nonfinite:
        row["nonfinite"] = nonfinite
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _append_line(path: Path, line: bytes) -> None:
    """One write and a sync; if the disk is full the file is cut back to what it was."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(fd).st_size
        try:
            num_written = os.write(fd, line)
            if num_written != len(line):
                raise OSError(f"{path}: {num_written} of {len(line)} bytes written; is the disk full?")
            os.fsync(fd)
        except OSError:
            os.ftruncate(fd, before)
            raise
    finally:
        os.close(fd)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


class SumCount:
    """Sums and counts by name; they add up over microbatches and ranks in any split, and are divided once.

    >>> a, b = SumCount(), SumCount()
    >>> a.add("entropy/all", 6.0, 4); b.add("entropy/all", 2.0, 4); a.merge(b); a.mean("entropy/all")
    1.0
    """

    def __init__(self, values: Mapping[str, tuple[SupportsFloat, SupportsFloat]] | None = None) -> None:
        self._values: dict[str, tuple[float, float]] = {}
        for name, (total, count) in (values or {}).items():
            self.add(name, total, count)

    def add(self, name: str, total: SupportsFloat, count: SupportsFloat = 1) -> None:
        """Add ``total``, a sum over ``count`` items (numbers or scalar tensors)."""
        if float(count) < 0:
            raise ValueError(f"metric {name} came with count {float(count)}, expected >= 0")
        old_total, old_count = self._values.get(name, (0.0, 0.0))
        self._values[name] = (old_total + float(total), old_count + float(count))

    def merge(self, other: SumCount | Mapping[str, tuple[SupportsFloat, SupportsFloat]]) -> None:
        """Add everything of ``other``: another accumulator or the metrics of a ``LossOutput``."""
        values = other.as_dict() if isinstance(other, SumCount) else other
        for name, (total, count) in values.items():
            self.add(name, total, count)

    def mean(self, name: str) -> float | None:
        """Sum over count; None if nothing was counted (a region without tokens has no mean)."""
        total, count = self._values.get(name, (0.0, 0.0))
        return total / count if count else None

    def means(self) -> dict[str, float]:
        """Means of everything that was counted."""
        return {name: total / count for name, (total, count) in self._values.items() if count}

    def as_dict(self) -> dict[str, tuple[float, float]]:
        """Plain ``{name: (sum, count)}``, ready to be gathered from other ranks and merged."""
        return dict(self._values)


class PhaseTimer:
    """Wall seconds by phase, and ``total`` for the ``with`` block as a whole.

    ``with PhaseTimer() as timer: ... with timer.phase("rollout"): ...`` then ``StepReport(seconds=timer.seconds)``.
    A phase entered several times adds up; one that raises is counted up to there.  ``on_phase`` is told the name of
    each that begins, and each runs inside ``around`` of its name.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        on_phase: Callable[[str], object] | None = None,
        around: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._clock = clock
        self._on_phase = on_phase
        self._around = around
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._started: float | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of all finished phases; ``total`` counts up to now while the outer block runs."""
        total = {} if self._started is None else {"total": self._clock() - self._started}
        return {**self._seconds, **total}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as ``name``.  Phases do not nest: their sum must stay below ``total``."""
        if self._running:
            raise ValueError(f"phase {name!r} starts inside phase {self._running[-1]!r}: its seconds would count twice")
        self._running.append(name)
        if self._on_phase is not None:
            self._on_phase(name)
        started = self._clock()
        try:
            with self._around(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - started
            self._running.pop()

    def __enter__(self) -> PhaseTimer:
        self._started = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds["total"] = self.seconds["total"]
        self._started = None
