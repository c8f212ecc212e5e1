"""SwanLab.  ``SWANLAB_MODE=offline`` writes into the run folder; ``swanlab sync`` sends that later."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rest.trainer.trackers.base import TrackedRun

__all__ = ["track"]


class _Run:
    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        import swanlab

        self._swanlab = swanlab
        self.run_id = run.run_id or secrets.token_hex(16)[:21]  # as long as SwanLab wants it
        values: dict[str, Any] = {
            "project": "megatron_rest", "experiment_name": run.name, "logdir": str(run.run_dir / "swanlog"), **settings,
        }  # fmt: skip
        swanlab.init(id=self.run_id, resume="allow", config=dict(run.config), **values)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._swanlab.log(dict(values), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        texts = [
            self._swanlab.Text("\n\n".join(f"{c}: {v}" for c, v in zip(columns, row, strict=True))) for row in rows
        ]
        self._swanlab.log({name: texts}, step=step)

    def picture(self, name: str, path: Path) -> None:
        self._swanlab.log({f"plots/{name}": self._swanlab.Image(str(path))})

    def close(self, *, is_finished: bool) -> None:
        if is_finished:
            self._swanlab.finish()
        else:
            self._swanlab.finish(state="aborted")


def track(run: TrackedRun, **settings: Any) -> _Run:
    """``settings``: arguments of ``swanlab.init`` (project, workspace, mode, tags ...)."""
    return _Run(run, settings)
