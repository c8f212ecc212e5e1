"""Traces: the steps that were asked for, one file a rank, phases under the names of the metrics."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_rest.config import ConfigError, ProfileConfig, RestConfig, TrainerConfig, validate
from megatron_rest.trainer.metrics import PhaseTimer
from megatron_rest.trainer.profiler import Profiler


def steps(profiler: Profiler, last: int) -> None:
    for step in range(1, last + 1):
        with profiler.step(step), PhaseTimer(around=profiler.phase) as timer:
            with timer.phase("rollout"):
                torch.ones(8) @ torch.ones(8)
            with timer.phase("update"):
                torch.ones(8).sum()


def names(path: Path) -> set[str]:
    with gzip.open(path, "rt") as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


def test_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(steps="2-3"), run_dir=tmp_path, rank=1)
    steps(profiler, 4)
    assert [p.name for p in (tmp_path / "profile").iterdir()] == ["steps_2-3_rank_1.json.gz"]
    found = names(profiler.path)
    assert {"step 2", "step 3", "rollout", "update", "aten::dot"} <= found and not {"step 1", "step 4"} & found


def test_one_that_raises_leaves_what_it_has(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(steps="1-9"), run_dir=tmp_path, rank=0)
    with pytest.raises(KeyError), profiler.step(1):
        raise KeyError
    assert "step 1" in names(profiler.path)
    steps(Profiler(ProfileConfig(), run_dir=tmp_path / "none", rank=0), 2)
    assert not (tmp_path / "none").exists()


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    steps(Profiler(ProfileConfig(steps="1"), run_dir=tmp_path, rank=0), 1)
    assert "could not be written" in caplog.text


@pytest.mark.parametrize("text", ["0", "3-", "-3", "a", "5-3", "1-2-3"])
def test_what_is_no_step(text: str) -> None:
    with pytest.raises(ConfigError, match=r"profile\.steps"):
        ProfileConfig(steps=text)


def test_steps_behind_the_last_one() -> None:
    with pytest.raises(ConfigError, match="lies behind the last step"):
        validate(RestConfig(profile=ProfileConfig(steps="7"), trainer=TrainerConfig(steps=6)), world_size=1)
