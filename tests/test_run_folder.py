"""One run, one folder: who may have it, and what becomes of a dead owner's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from launch.recipe import refuse_folder_in_use
from megatron_rest import preflight, run_folder
from megatron_rest.config import ConfigError, ModelConfig, RestConfig, TrainerConfig, load
from megatron_rest.run_folder import LOCK_FILE, Owner, finish, hold, is_finished, owner_of

HOLDER = """
import sys, time
from megatron_rest.run_folder import hold
with hold(sys.argv[1]):
    print("has it", flush=True)
    time.sleep(60)
"""
BEATS = """
import os, sys, time
for _ in range(600):
    os.utime(sys.argv[1])
    print("beat", flush=True)
    time.sleep(0.5)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "has it\n"
    return child


def test_a_living_owner_keeps_its_folder_and_a_dead_ones_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = holder(tmp_path)
    try:
        with pytest.raises(ConfigError, match=rf"belongs to process {child.pid} on .*choose another trainer.run_dir"):
            hold(tmp_path).__enter__()
        with pytest.raises(SystemExit) as stopped:
            refuse_folder_in_use(RestConfig(trainer=TrainerConfig(run_dir=str(tmp_path))))
        assert stopped.value.code == 2 and f"process {child.pid}" in capsys.readouterr().err
    finally:
        child.kill()
        child.wait()
    assert owner_of(tmp_path) is None
    said: list[str] = []
    with hold(tmp_path, say=said.append) as me:
        assert "taken over from process" in said[0] and "which is gone" in said[0]
        assert owner_of(tmp_path) == me
    assert not list(tmp_path.iterdir()), "nothing is left of the lock"


def test_of_an_owner_on_another_machine_the_age_of_its_lock_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "STALE_SECONDS", 3.0)
    monkeypatch.setattr(run_folder, "_POLL_SECONDS", 0.1)
    other = replace(Owner.here(), host="elsewhere", space="another boot", job="slurm 7.0")
    lock = tmp_path / LOCK_FILE
    lock.write_text(json.dumps(asdict(other)))
    beats = subprocess.Popen([sys.executable, "-c", BEATS, str(lock)], stdout=subprocess.PIPE, text=True)
    assert beats.stdout is not None and beats.stdout.readline() == "beat\n"
    try:
        with pytest.raises(ConfigError, match=r"belongs to .* on elsewhere, job slurm 7.0"):
            hold(tmp_path).__enter__()
    finally:
        beats.kill()
        beats.wait()
    with hold(tmp_path) as me:
        assert owner_of(tmp_path) == me
    lock.write_text(json.dumps(asdict(other)))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the same job again: its first start is over
    monkeypatch.setattr(run_folder, "STALE_SECONDS", 1e9)  # so its lock is not waited for
    with hold(tmp_path) as me:
        assert owner_of(tmp_path) == me


def test_the_end_of_a_run_is_told_from_that_of_another(tmp_path: Path) -> None:
    config = RestConfig(trainer=TrainerConfig(run_dir=str(tmp_path), steps=2))
    assert not is_finished(config)
    made = {"engine_args": {"max_num_seqs": 16}, "megatron": {"optimizer": {"lr": 1e-6, "clip": None}}}
    finish(config, made)
    assert is_finished(config)
    assert not is_finished(replace(config, trainer=replace(config.trainer, steps=3)))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["resolved"] == made
    assert load(tmp_path / "config.yaml") == config, "the record is no setting"
    (tmp_path / "config.yaml").write_text("trainer: [")
    assert not is_finished(config)


def test_a_file_that_is_no_lock_is_in_nobodys_way(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"pid": "x"}'):
        (tmp_path / LOCK_FILE).write_text(text)
        with hold(tmp_path) as me:
            assert owner_of(tmp_path) == me


def test_a_machine_that_lacks_something_is_one_line(tmp_path: Path) -> None:
    config = RestConfig(model=ModelConfig(path=str(tmp_path)))
    preflight.check_machine(config, environ={})
    with pytest.raises(preflight.MachineError, match=r"should use 8 GPUs, and PyTorch .* (built without CUDA|can use)"):
        preflight.check_machine(config, environ={"REST_GPUS_PER_NODE": "8"})
    missing = RestConfig(model=ModelConfig(path=str(tmp_path / "unmounted")))
    with pytest.raises(preflight.MachineError, match=r"is not a folder on .*REST_MOUNTS"):
        preflight.check_machine(missing, environ={})
    assert os.environ.get("REST_GPUS_PER_NODE") is None
