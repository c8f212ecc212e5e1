"""Stages on this machine: live output, a failure that stops the rest, and Ctrl-C that leaves nobody behind."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.local import _clear, _is_complete, _stamp, command
from launch.processes import descendants
from launch.recipe import Stage

from .conftest import ROOT

TIMEOUT = 400.0


@contextmanager
def started(
    environment: dict[str, str], *arguments: str, stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.stages", *arguments],
        stdout=stdout, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def output(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    with started(environment, *arguments) as process:
        text, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, text.decode()


def test_output_arrives_without_prefixes_and_is_kept(environment: dict[str, str], tmp_path: Path) -> None:
    status, text = output(environment, str(tmp_path), "say", "2")
    assert status == 0, text
    lines = text.splitlines()
    assert lines[0] == "==> first (1 of 2)"
    assert "rank 0 of 2 tty=False" in lines
    assert "to stderr" in lines
    assert not any("rank 1" in line for line in lines)  # other ranks write to files
    (log,) = (tmp_path / "logs/first").rglob("1/stdout.log")
    assert "rank 1 of 2" in log.read_text()
    assert "rank 0 of 2 tty=False" in (tmp_path / "logs/first.log").read_text()
    assert lines[-1].startswith("==> second: ")


def test_with_a_terminal_the_job_has_one_too(environment: dict[str, str], tmp_path: Path) -> None:
    master, slave = pty.openpty()
    with started(environment, str(tmp_path), "say", "0", stdout=slave) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                chunk = os.read(master, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        assert process.wait(TIMEOUT) == 0, seen.decode()
    assert b"tty=True" in seen
    assert b"10 %\r100 %" in seen  # redrawn in place
    log = (tmp_path / "logs/first.log").read_text()
    assert "tty=True\n100 %\nto stderr\n" in log  # what was overwritten is noise in a log


def test_a_failed_stage_stops_the_rest_and_shows_the_rank_that_failed(
    environment: dict[str, str], tmp_path: Path
) -> None:
    status, text = output(environment, str(tmp_path), "fail", "2", "1")
    assert status == 1, text
    assert "no luck on rank 1" in text
    assert "first failed; its output:" in text
    assert "second" not in text


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.extended)]
)
def test_a_signal_ends_every_process(
    signum: signal.Signals, status: int, environment: dict[str, str], tmp_path: Path
) -> None:
    with started(environment, str(tmp_path), "sleep", "2", str(tmp_path)) as process:
        files = [tmp_path / f"pids-{rank}" for rank in range(2)]
        wait_for(lambda: all(path.exists() and " " in path.read_text() for path in files))
        pids = [int(word) for path in files for word in path.read_text().split()]
        process.send_signal(signum)
        assert process.wait(TIMEOUT) == status
        wait_for(lambda: not any(is_running(pid) for pid in pids))


def wait_for(condition: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_complete_stage_is_not_run_again_until_its_command_changes(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("a: 1\n")
    stage = Stage(name="s", module="m", arguments=("--config", str(config)), produces=tmp_path / "out")
    assert not _is_complete(stage)
    _stamp(stage)  # nothing was produced: no stamp
    assert not _is_complete(stage)
    (tmp_path / "out").mkdir()
    assert not _is_complete(stage)  # interrupted
    _stamp(stage)
    assert _is_complete(stage)
    config.write_text("a: 2\n")
    assert not _is_complete(stage)
    _clear(stage)
    assert not (tmp_path / "out").exists()


def test_ranks_meet_on_a_free_port() -> None:
    words = command(Stage(name="s", module="m", ranks=4), Path("/logs"))
    assert "--standalone" in words
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert words[words.index("--redirects") + 1] == "1:3,2:3,3:3"
    alone = command(Stage(name="s", module="m", ranks=1), Path("/logs"))
    assert alone[alone.index("--redirects") + 1] == "0"  # torchrun refuses an empty mapping
    assert words[-2:] == ["-m", "m"]
