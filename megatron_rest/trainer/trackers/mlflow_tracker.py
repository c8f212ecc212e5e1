"""MLflow, through its client for tracking servers and files; ``MLFLOW_TRACKING_URI``, else a folder of the run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rest.trainer.trackers.base import TrackedRun

__all__ = ["track"]

_MOST_PARAMS = 100  # of one request
_LONGEST_PARAM = 6000  # characters
_MOST_METRICS = 1000


class _Run:
    def __init__(self, run: TrackedRun, tracking_uri: str, experiment: str, run_name: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        if not (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            tracking_uri = (run.run_dir / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones ask for it
        self._metric = Metric
        self._client = MlflowClient(tracking_uri=tracking_uri or None)
        self.run_id = run.run_id or self._new(experiment, run_name or run.name)
        self._client.update_run(self.run_id, status="RUNNING")
        params = [Param(key, text[:_LONGEST_PARAM]) for key, text in _flat(run.config)]
        for start in range(0, len(params) if run.run_id is None else 0, _MOST_PARAMS):  # they are written once
            self._client.log_batch(self.run_id, params=params[start : start + _MOST_PARAMS])
        self._client.set_tag(self.run_id, "mlflow.source.git.commit", str(run.config.get("code", "unknown")))
        self._client.log_dict(self.run_id, dict(run.config), f"config_after_step_{run.after_step}.json")

    def _new(self, experiment: str, name: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        return str(self._client.create_run(number, run_name=name).info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(key, value, now, step) for key, value in values.items()]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _MOST_METRICS])

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        content = {"columns": list(columns), "data": [list(row) for row in rows]}  # as MLflow shows tables
        self._client.log_dict(self.run_id, content, f"{name}/step_{step:06d}.json")

    def picture(self, name: str, path: Path) -> None:
        self._client.log_artifact(self.run_id, str(path), "plots")

    def close(self, *, is_finished: bool) -> None:
        self._client.set_terminated(self.run_id, status="FINISHED" if is_finished else "KILLED")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".replace(":", "/"), value if isinstance(value, str) else json.dumps(value)


def track(run: TrackedRun, *, tracking_uri: str = "", experiment: str = "megatron_rest", run_name: str = "") -> _Run:
    """``tracking_uri``: a server or a folder; empty = ``MLFLOW_TRACKING_URI``, else the run's own ``mlruns``."""
    return _Run(run, tracking_uri, experiment, run_name)
