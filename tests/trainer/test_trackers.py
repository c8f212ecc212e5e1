"""Loggers: told in order, and nothing that they do holds or ends a run.

The clients of W&B, MLflow, SwanLab and Trackio write into the run's folder here, offline; a test of one that is not
installed is skipped and says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rest.config import ConfigError, TrainerConfig
from megatron_rest.trainer.trackers import TrackedRun, Trackers, check_loggers, told
from megatron_rest.types import StepReport

LOGGERS = """
import threading
heard, stuck = [], threading.Event()

class Good:
    def __init__(self, run, *, word="said"):
        heard.append((word, run.run_id, run.config["trainer"]["steps"]))
        self.run_id = "mine"
    def log(self, step, values): heard.append((step, dict(values)))
    def table(self, step, name, columns, rows): heard.append((step, name, len(rows)))
    def picture(self, name, path): heard.append(name)
    def close(self, *, is_finished): heard.append(is_finished)

class Moody(Good):
    def log(self, step, values):
        if step != 2:
            raise ConnectionError("no network\\nhere")
        super().log(step, values)

class Stuck(Good):
    def log(self, step, values): stuck.wait()

def leaves(run):
    raise SystemExit(1)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "myloggers.py").write_text(LOGGERS)
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    import myloggers

    yield myloggers
    myloggers.stuck.set()
    del sys.modules["myloggers"]


def report(step: int, **metrics: float) -> StepReport:
    return StepReport(step=step, policy_version=step, metrics=metrics, seconds={"total": 1.0})


def tracked(run_dir: Path) -> TrackedRun:
    run_dir.mkdir(exist_ok=True)
    return TrackedRun(name="r", run_dir=run_dir, config={"trainer": {"steps": 9}, "code": "abc"})


def test_a_logger_of_ones_own_hears_everything_in_order(mine: Any, tmp_path: Path) -> None:
    config = TrainerConfig(loggers="tensorboard,myloggers:Good", logger_arguments={"Good": {"word": "hi"}})
    for expected in (None, "mine"):  # the second start finds the same run
        mine.heard.clear()
        trackers = Trackers(config, tracked(tmp_path / "run"))
        trackers.log(report(1, good=1.0, bad=float("nan")))
        trackers.table(1, "samples", ["a"], [["x"], ["y"]])
        trackers.picture(Path("reward.png"))
        assert trackers.close(is_finished=True) == [] and trackers.num_failures == 0
        values = {"good": 1.0, "seconds/total": 1.0, "policy_version": 1.0}
        assert mine.heard == [("hi", expected, 9), (1, values), (1, "samples", 2), "reward", True]


def test_what_fails_is_said_once_and_counted(mine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = Trackers(TrainerConfig(loggers="myloggers:Moody,myloggers:leaves"), tracked(tmp_path / "run"))
    for step in (1, 2, 3):
        trackers.log(report(step))
    lines = trackers.close(is_finished=False)
    assert [heard[0] for heard in mine.heard if isinstance(heard, tuple)] == ["said", 2]
    assert lines[0] == "myloggers:Moody was not told everything: 2 times; the first: ConnectionError: no network here"
    assert lines[1].startswith("myloggers:leaves was not told everything: 5 times; the first: SystemExit: 1")
    assert trackers.num_failures == 7 and len(caplog.records) == 2


def test_one_that_hangs_holds_nobody(mine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(told, "_MOST_WAITING", 3)
    trackers = Trackers(TrainerConfig(loggers="myloggers:Stuck"), tracked(tmp_path / "run"))
    for step in range(1, 9):
        trackers.log(report(step))
    [line] = trackers.close(is_finished=True)
    assert "3 things behind" in line and trackers.num_failures >= 4


def test_a_client_that_is_missing_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(told._CLIENTS, "wandb", "no_such_client")
    with pytest.raises(ConfigError, match=r"names wandb, .* pip install 'megatron_rest\[wandb\]'"):
        check_loggers(TrainerConfig(loggers="tensorboard,wandb"))
    with pytest.raises(ConfigError, match="did you mean wandb"):
        TrainerConfig(loggers="wandbb")
    with pytest.raises(ConfigError, match="names no such logger"):
        TrainerConfig(logger_arguments={"wandb": {}})


def told_twice(logger: str, run_dir: Path, **arguments: Any) -> None:
    """A run that is stopped after a step, and one that continues it; both with everything that a logger is told."""
    from matplotlib import pyplot

    run = tracked(run_dir)
    pyplot.figure(figsize=(1, 1)).savefig(run_dir / "reward.png")
    config = TrainerConfig(loggers=logger, logger_arguments={logger: arguments} if arguments else {})
    for step in (1, 2):
        trackers = Trackers(config, run)
        trackers.log(report(step, **{"reward/total": 0.5 * step}))
        trackers.table(step, "samples", ["prompt", "reward"], [["asked", 0.5], ["again", -1.0]])
        trackers.picture(run_dir / "reward.png")
        assert trackers.close(is_finished=step == 2) == []
    ids = json.loads((run_dir / told.IDS_FILE).read_text())
    assert list(ids) == [logger]


def offline(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **variables: str) -> None:
    for key, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(key, value)  # before a client is imported, which may read them then
    pytest.importorskip(name, reason=f"the client {name} is not installed: pip install 'megatron_rest[{name}]'")


def test_mlflow_has_the_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline("mlflow", monkeypatch, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    told_twice("mlflow", tmp_path / "run")
    client = MlflowClient(tracking_uri=(tmp_path / "run" / "mlruns").as_uri())
    [experiment] = [e for e in client.search_experiments() if e.name == "megatron_rest"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["trainer.steps"] == "9"
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    points = client.get_metric_history(run.info.run_id, "reward/total")
    assert [(p.step, p.value) for p in points] == [(1, 0.5), (2, 1.0)]
    kept = {file.path for folder in ("samples", "plots") for file in client.list_artifacts(run.info.run_id, folder)}
    assert kept == {"samples/step_000001.json", "samples/step_000002.json", "plots/reward.png"}


@pytest.mark.extended
def test_wandb_writes_both_starts_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline("wandb", monkeypatch, tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    told_twice("wandb", tmp_path / "run")
    [name] = json.loads((tmp_path / "run" / told.IDS_FILE).read_text()).values()
    folders = [p for p in (tmp_path / "run" / "wandb").iterdir() if p.name.startswith("offline-run-") and p.is_dir()]
    assert folders and all(p.name.endswith(name) for p in folders)
    assert {p.name for folder in folders for p in folder.glob("*.wandb")} == {f"run-{name}.wandb"}


@pytest.mark.extended
def test_swanlab_writes_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline("swanlab", monkeypatch, tmp_path, SWANLAB_MODE="offline")
    told_twice("swanlab", tmp_path / "run", mode="offline")
    assert list((tmp_path / "run" / "swanlog").rglob("*.swanlab")), "what swanlab sync sends"


@pytest.mark.extended
def test_trackio_has_the_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline("trackio", monkeypatch, tmp_path, TRACKIO_DIR=str(tmp_path / "run" / "trackio"))
    told_twice("trackio", tmp_path / "run")
    import sqlite3

    [path] = (tmp_path / "run" / "trackio").glob("megatron_rest*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select step, metrics from metrics where run_name = 'r' order by step").fetchall()
    told_of = [(step, json.loads(values).get("reward/total")) for step, values in rows]
    assert [pair for pair in told_of if pair[1] is not None] == [(1, 0.5), (2, 1.0)]
