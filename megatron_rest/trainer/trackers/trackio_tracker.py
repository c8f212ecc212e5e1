"""Trackio: a file of its own in the run folder, ``TRACKIO_DIR`` or a Space; ``trackio show`` draws it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rest.trainer.trackers.base import TrackedRun

__all__ = ["track"]


class _Run:
    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.run_dir / "trackio"))  # read when it is imported
        import trackio

        self._trackio = trackio
        self.run_id = run.run_id or run.name  # Trackio finds runs by their names
        values: dict[str, Any] = {"project": "megatron_rest", "embed": False, **settings}
        self._run = trackio.init(name=self.run_id, resume="allow", config=dict(run.config), **values)
        self._step = run.after_step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        self._run.log(dict(values), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        import pandas

        frame = pandas.DataFrame([list(row) for row in rows], columns=list(columns))
        self._run.log({name: self._trackio.Table(dataframe=frame)}, step=step)

    def picture(self, name: str, path: Path) -> None:
        self._run.log({f"plots/{name}": self._trackio.Image(str(path))}, step=self._step)

    def close(self, *, is_finished: bool) -> None:
        self._run.finish()


def track(run: TrackedRun, **settings: Any) -> _Run:
    """``settings``: arguments of ``trackio.init`` (project, group, space_id ...)."""
    return _Run(run, settings)
