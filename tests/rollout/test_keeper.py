"""Processes of an engine end with their owner, and nothing of them stays, whoever is killed and in which order.

What is started here in the place of an engine's worker does what vLLM's does: it starts processes, one of which leaves
its session, and shares memory with them that nobody unlinks.  With real engines: test_remote.py,
tests/trainer/test_kill_matrix.py.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_rest.processes import is_resource_tracker, my_processes, session_of, start_of

SECONDS = 60.0

WORKER = """
import os, subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")
child = "import os, sys, time; os.setsid(); print('child', os.getpid(), flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
print("worker", os.getpid(), memory.name, flush=True)
time.sleep(600)
"""
OWNER = f"""
import os, sys, time
from megatron_rest.rollout.keeper import EngineProcesses, new_engine_folder
folder = new_engine_folder()
engine = EngineProcesses([sys.executable, "-c", {WORKER!r}], folder=folder, environment=os.environ, descriptors=())
print("keeper", engine._keeper.pid, folder, flush=True)
for line in sys.stdin:
    engine.end()
    print("ended", flush=True)
"""


class Setting:
    """An owner and its engine."""

    def __init__(self, folder: Path) -> None:
        self.owner = subprocess.Popen(
            [sys.executable, "-c", OWNER],
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said = {}
        while len(said) < 3:
            assert self.owner.stdout is not None
            word, pid, *rest = self.owner.stdout.readline().split()
            said[word] = (int(pid), *rest)
        self.worker, self.shm = said["worker"][0], Path("/dev/shm", said["worker"][1])
        self.keeper, self.folder = said["keeper"][0], Path(said["keeper"][1])
        self.child = said["child"][0]
        record = self.folder / "keeper.json"
        until(lambda: record.exists() and str(self.shm) in record.read_text())  # the keeper has looked

    def left(self) -> list[str]:
        processes = [str(pid) for pid in (self.worker, self.child, self.keeper) if start_of(pid)]
        return processes + [str(path) for path in (self.shm, self.folder) if path.exists()]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(setting: Setting, *pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    if setting.owner.pid in pids:
        setting.owner.wait()


@pytest.mark.parametrize("ending", ["owner", "worker, then owner", "stopped worker, owner", "asked to"])
def test_nothing_is_left_of_an_engine(tmp_path: Path, ending: str) -> None:
    setting = Setting(tmp_path)
    assert len(setting.left()) == 5, "it is all there before"
    match ending:
        case "owner":
            kill(setting, setting.owner.pid)
        case "worker, then owner":
            kill(setting, setting.worker)
            time.sleep(0.1)
            assert start_of(setting.child), "nobody has looked yet"
            kill(setting, setting.owner.pid)
        case "stopped worker, owner":
            os.kill(setting.worker, signal.SIGSTOP)
            kill(setting, setting.owner.pid)
        case "asked to":
            assert setting.owner.stdin is not None and setting.owner.stdout is not None
            setting.owner.stdin.write("end\n")
            setting.owner.stdin.flush()
            assert setting.owner.stdout.readline() == "ended\n"
            assert setting.left() == []
            setting.owner.stdin.close()
            setting.owner.wait()
    until(lambda: setting.left() == [])


def test_memory_that_nobody_maps_any_more_goes_too(tmp_path: Path) -> None:
    """Its processes have ended by themselves, or let go of it, before anybody looked: Python's tracker knows of it."""
    from megatron_rest.rollout import keeper

    program = (
        "import time; from multiprocessing.shared_memory import SharedMemory as Shared; "
        "m = Shared(create=True, size=4096); m.close(); print(m.name, flush=True); time.sleep(600)"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert worker.stdout is not None
    shared = Path("/dev/shm", worker.stdout.readline().strip())
    assert shared.exists()

    def trackers() -> list[int]:
        return [pid for pid in my_processes() if session_of(pid) == worker.pid and is_resource_tracker(pid)]

    until(lambda: len(trackers()) == 1)  # forked it is, but on a busy machine not yet another program
    [tracker] = trackers()
    keeper.end_processes(tmp_path, worker.pid)
    assert not shared.exists() and not start_of(tracker) and worker.wait() == -signal.SIGKILL


def test_what_dead_runs_left_goes_when_the_next_one_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything was killed at once: nobody was there to clean up."""
    from megatron_rest.rollout import keeper

    monkeypatch.setattr(keeper.tempfile, "gettempdir", lambda: str(tmp_path))
    dead, living = Setting(tmp_path), Setting(tmp_path)
    kill(dead, dead.keeper, dead.owner.pid, dead.worker)
    until(lambda: len(dead.left()) == 3)  # a process, a folder and shared memory
    strange = tmp_path / "engine-of-somebody"
    strange.mkdir()
    keeper.sweep()
    assert dead.left() == [] and len(living.left()) == 5 and strange.exists(), "what lives, or is young, stays"
    os.utime(strange, (1, 1))
    keeper.sweep()
    assert not strange.exists()
    kill(living, living.owner.pid)
    until(lambda: living.left() == [])


def test_what_an_engine_inside_this_process_shares_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers' memory needs no name any more; Python's keeps it until the end."""
    from megatron_rest.rollout import keeper

    monkeypatch.setattr(keeper, "_living", {})
    names = ("vllm_dist_", "psm_", "other_")
    paths = [Path("/dev/shm") / f"{start}test-{os.getpid()}" for start in names]
    try:
        maps = []
        for path in paths:
            path.write_bytes(b"shared")
            with path.open("r+b") as file:
                maps.append(mmap.mmap(file.fileno(), 0))
        keeper.keep_own_segments({str(paths[-1])})
        assert [path.exists() for path in paths] == [False, True, True] and maps[0][:6] == b"shared"
        keeper.end_all()
        assert [path.exists() for path in paths] == [False, False, True]
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def test_a_keeper_ignores_what_a_terminal_sends(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(setting.keeper, number)
    time.sleep(0.2)
    assert psutil.pid_exists(setting.keeper) and len(setting.left()) == 5
    kill(setting, setting.owner.pid)
    until(lambda: setting.left() == [])
