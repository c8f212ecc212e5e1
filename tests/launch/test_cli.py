"""The console script: NeMo-Run's own commands, the shim, the sorting of arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import split_arguments

from .conftest import ROOT


def test_other_commands_go_to_nemo_run(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "experiment", "--help"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "status" in done.stdout
    assert "cancel" in done.stdout


def test_python_runs_a_launch_file_as_the_console_script_does(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/rest_8b.py"), "--dryrun", "optimizer.lrr=1"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean optimizer.lr?" in done.stderr


SHIM = """
import sys
from launch.compat import ensure_nemo_run_importable
assert ensure_nemo_run_importable() == {expected}
import nemo_run, nemo_run.core.execution.lepton as lepton
assert "torch" not in sys.modules
if {expected}:
    from leptonai.api.v1.client import APIClient
    try:
        APIClient()
    except RuntimeError as error:
        assert "Lepton" in str(error)
    else:
        raise AssertionError("a stand-in was called")
    try:
        import leptonai.somewhere
    except ImportError:
        pass
    else:
        raise AssertionError("names nobody asked for are served")
"""


def test_nemo_run_imports_without_leptonai(environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", SHIM.format(expected=True)], env=environment, check=True, timeout=300)


def test_nemo_run_imports_with_a_leptonai_that_lacks_the_old_api(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "leptonai/api").mkdir(parents=True)
    (tmp_path / "leptonai/__init__.py").write_text("")
    (tmp_path / "leptonai/api/__init__.py").write_text("")
    env = environment | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    subprocess.run([sys.executable, "-c", SHIM.format(expected=True)], env=env, check=True, timeout=300)


def test_arguments_are_sorted_by_who_reads_them() -> None:
    ours, theirs = split_arguments(
        ["--yes", "nodes=2", "run.executor=slurm", "optimizer.lr=1", "config=a=b.yaml", "run.executor.env_vars[X]=1"],
        ["nodes"],
    )
    assert ours == ["optimizer.lr=1", "config=a=b.yaml"]
    assert theirs == ["--yes", "nodes=2", "run.executor=slurm", "run.executor.env_vars[X]=1"]


def test_every_launch_file_finds_its_executor_by_itself(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/rest_demo.py"), "--dryrun"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_override_that_looks_like_python_is_not_evaluated() -> None:
    text = "model.path=lambda x: __import__('os').system('touch pwned')"
    assert split_arguments([text], []) == ([text], [])


@pytest.mark.parametrize("argument", ["stepz", "lr=1", "="])
def test_what_nobody_reads_is_an_error(argument: str) -> None:
    with pytest.raises(ValueError, match=r"unknown|form section.key=value"):
        split_arguments([argument], ["nodes"])
