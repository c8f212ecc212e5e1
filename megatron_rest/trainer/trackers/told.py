"""All trackers of a run.  What one of them does, fails at or waits for is nothing to the run.

Each has a thread that does what it is told in order.  The first thing that fails is warned of, all are counted
(``tracker/failures`` in the metrics, and a line at the end).  A tracker that falls far behind loses what is new.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rest.config import ConfigError, LoggerEntry, TrainerConfig
from megatron_rest.trainer.trackers.base import TrackedRun, Tracker, TrackerFactory
from megatron_rest.types import StepReport
from megatron_rest.user_code import NamedCode, is_reference, load_named

__all__ = ["IDS_FILE", "Trackers", "check_loggers"]

IDS_FILE = "trackers.json"
"""In the run folder: under which id each tracker knows the run."""
_CLIENTS = {"wandb": "wandb", "mlflow": "mlflow", "swanlab": "swanlab", "trackio": "trackio"}  # logger: module
_MOST_WAITING = 10_000
_CLOSE_SECONDS = 60.0

_log = logging.getLogger(__name__)


def check_loggers(config: TrainerConfig) -> None:
    """Raises ConfigError for a logger whose client is not installed here."""
    for entry in config.as_loggers():
        module = _CLIENTS.get(entry.name)
        if module is not None and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"trainer.loggers names {entry.name}, whose client is not installed: pip install "
                f"'megatron_rest[{entry.name}]', or leave it out"
            )


class Trackers:
    """The trackers of one run; on rank 0.

    Args:
        config: names them.
        run: what they are told at the start.
    """

    def __init__(self, config: TrainerConfig, run: TrackedRun) -> None:
        self._ids = _Ids(run.run_dir)
        self._told = [_Told(entry, run, self._ids) for entry in config.as_loggers() if entry.name != "tensorboard"]

    @property
    def is_empty(self) -> bool:
        """Whether nobody is told."""
        return not self._told

    @property
    def num_failures(self) -> int:
        """What could not be told, of all trackers."""
        return sum(told.num_failures for told in self._told)

    def log(self, report: StepReport) -> None:
        values = {**report.metrics, **{f"seconds/{phase}": s for phase, s in report.seconds.items()}}
        values["policy_version"] = report.policy_version
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._tell(lambda tracker: tracker.log(report.step, finite))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        self._tell(lambda tracker: tracker.table(step, name, columns, rows))

    def picture(self, path: Path) -> None:
        self._tell(lambda tracker: tracker.picture(path.stem, path))

    def close(self, *, is_finished: bool) -> list[str]:
        """Wait until all are told, a minute at most; a line about each that was not told everything."""
        for told in self._told:
            told.tell(lambda tracker: tracker.close(is_finished=is_finished))
            told.end()
        return [line for told in self._told for line in told.wait(_CLOSE_SECONDS)]

    def _tell(self, what: Callable[[Tracker], object]) -> None:
        for told in self._told:
            told.tell(what)


class _Told:
    def __init__(self, entry: LoggerEntry, run: TrackedRun, ids: _Ids) -> None:
        self._name = entry.name
        self._waiting: queue.Queue[Callable[[Tracker], object] | None] = queue.Queue(_MOST_WAITING)
        self.num_failures = 0
        self._first = ""
        self._thread = threading.Thread(target=self._run, args=(entry, run, ids), name=entry.name, daemon=True)
        self._thread.start()

    def tell(self, what: Callable[[Tracker], object]) -> None:
        try:
            self._waiting.put_nowait(what)
        except queue.Full:
            self._fail(f"it is {_MOST_WAITING} things behind")

    def end(self) -> None:
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._fail("it is too far behind to be closed")

    def wait(self, seconds: float) -> list[str]:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._fail(f"it was not told everything within {seconds:g} s of the end")
        if not self.num_failures:
            return []
        return [f"{self._name} was not told everything: {self.num_failures} times; the first: {self._first}"]

    def _run(self, entry: LoggerEntry, run: TrackedRun, ids: _Ids) -> None:
        tracker: Tracker | None = None
        try:
            tracker = _factory(entry)(replace(run, run_id=ids.of(entry.name)), **entry.arguments)
            ids.remember(entry.name, tracker.run_id)
        except BaseException as error:  # noqa: BLE001  clients leave by SystemExit, too
            self._fail(f"{type(error).__name__}: {error}")
        while (what := self._waiting.get()) is not None:
            if tracker is None:
                self.num_failures += 1
                continue
            try:
                what(tracker)
            except BaseException as error:  # noqa: BLE001
                self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        self.num_failures += 1
        if not self._first:
            self._first = " ".join(why.split())[:300]
            _log.warning(
                "%s: %s; the run goes on (tracker/failures counts, this is said once)", self._name, self._first
            )


def _factory(entry: LoggerEntry) -> TrackerFactory:
    if is_reference(entry.name):
        found: TrackerFactory = load_named(
            NamedCode(key="trainer.loggers", reference=entry.name, called_with=("run",), arguments=entry.arguments)
        )
        return found
    module = importlib.import_module(f"megatron_rest.trainer.trackers.{entry.name}_tracker")
    made: TrackerFactory = module.track
    return made


class _Ids:
    """``trackers.json``."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / IDS_FILE
        self._lock = threading.Lock()

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}

    def of(self, name: str) -> str | None:
        with self._lock:
            return self._read().get(name)

    def remember(self, name: str, run_id: str) -> None:
        with self._lock:
            ids: Mapping[str, str] = {**self._read(), name: run_id}
            partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            partial.write_text(json.dumps(ids, indent=1) + "\n", encoding="utf-8")
            partial.replace(self._path)
