"""Weights & Biases.  Offline with ``WANDB_MODE=offline``; ``wandb sync`` sends what lies in the run folder later."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rest.trainer.trackers.base import TrackedRun

__all__ = ["track"]


class _Run:
    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self.run_id = run.run_id or secrets.token_hex(4)
        values: dict[str, Any] = {"project": "megatron_rest", "name": run.name, "tags": list(run.tags), **settings}
        self._run = wandb.init(
            id=self.run_id, resume="allow", dir=str(run.run_dir), config=dict(run.config),
            settings=wandb.Settings(console="off"), **values,
        )  # fmt: skip
        # An axis of our own: steps may be told again after a restart, which W&B's own counter refuses.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows]), "step": step})

    def picture(self, name: str, path: Path) -> None:
        self._run.log({f"plots/{name}": self._wandb.Image(str(path))})

    def close(self, *, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)


def track(run: TrackedRun, **settings: Any) -> _Run:
    """``settings``: arguments of ``wandb.init`` (project, entity, group, tags, notes ...)."""
    return _Run(run, settings)
