"""A logger: a line of text a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rest.trainer.trackers import TrackedRun


class PlainFile:
    """``run_dir/log.txt``."""

    run_id = "log.txt"

    def __init__(self, run: TrackedRun, *, key: str = "reward/total") -> None:
        self._file = (run.run_dir / "log.txt").open("a", encoding="utf-8")
        self._key = key

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(f"step {step}: {self._key} {values.get(self._key)}\n")

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        self._file.write(f"step {step}: {len(rows)} {name}\n")

    def picture(self, name: str, path: Path) -> None:
        self._file.write(f"plot {name}\n")

    def close(self, *, is_finished: bool) -> None:
        self._file.write("finished\n" if is_finished else "stopped\n")
        self._file.close()
