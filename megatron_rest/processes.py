"""Processes of this machine by what /proc says of them, and those that run code of the user's.

Standard library only; a process that is gone is no error.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

__all__ = [
    "end_worker",
    "is_resource_tracker",
    "mapped_segments",
    "my_processes",
    "serve_as_worker",
    "session_of",
    "space",
    "start_of",
    "start_worker",
    "variable_of",
    "when_gone",
]

_PROC = Path("/proc")
_SHM = "/dev/shm/"
_LOOK_SECONDS = 1.0  # between looks at the parent
_STATE, _SESSION, _START = 0, 3, 19  # fields of /proc/PID/stat behind the name


def space() -> str:
    """Boot and process namespace in which numbers of processes count."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # nobody else's


def start_of(pid: int) -> str:
    """Clock tick since boot at which a process began; empty for one that is gone or only waits to be collected."""
    fields = _stat(pid)
    return fields[_START] if fields else ""


def session_of(pid: int) -> int:
    """Of a living process; 0 for one that is gone."""
    fields = _stat(pid)
    return int(fields[_SESSION]) if fields else 0


def my_processes() -> Iterator[int]:
    """Of this user."""
    uid = os.getuid()
    for entry in os.scandir(_PROC):
        with suppress(OSError):
            if entry.name.isdecimal() and entry.stat().st_uid == uid:
                yield int(entry.name)


def variable_of(pid: int, name: str) -> str | None:
    """What an environment variable was when the process began; None where it was not set, or may not be read."""
    with suppress(OSError):
        for word in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
            key, _, value = word.partition(b"=")
            if key == name.encode():
                return os.fsdecode(value)
    return None


def is_resource_tracker(pid: int) -> bool:
    """Whether a process is Python's, which removes what others have shared when they are gone."""
    with suppress(OSError):
        return b"from multiprocessing.resource_tracker import main" in (_PROC / str(pid) / "cmdline").read_bytes()
    return False


def mapped_segments(pid: int) -> set[str]:
    """Files in /dev/shm that a process has mapped and that still have their name."""
    with suppress(OSError):
        lines = (_PROC / str(pid) / "maps").read_text(errors="surrogateescape").splitlines()
        return {line[line.index(_SHM) :] for line in lines if _SHM in line and not line.endswith("(deleted)")}
    return set()


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the name; none for a process that is gone or only waits to be collected."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[_STATE] in ("Z", "X") else fields


def start_worker(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """``python -m module`` that finds what this process finds, with pipes for lines of JSON; its errors are ours.

    It calls :func:`serve_as_worker` and runs code of the user's, which may start processes: :func:`end_worker` ends
    them with it, and so does the end of this process.
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, start_new_session=True)


def end_worker(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a worker and what it has started, dead or alive.  The caller collects it."""
    if process.returncode is None or session_of(process.pid) == 0:  # a number is not used again while its group lives
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def serve_as_worker() -> tuple[IO[bytes], IO[bytes]]:
    """In a worker, first: the pipes from and to its owner.

    Standard input becomes empty and standard output the errors', so that neither the user's code nor what it starts
    reads or writes what is not its own.  When the owner is gone this process ends with all it has started.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    when_gone(os.getppid(), lambda: os.killpg(0, signal.SIGKILL))
    return requests, replies


def when_gone(parent: int, act: Callable[[], object]) -> None:
    """Call ``act`` from a thread once the process that started this one has ended: the main thread may hang by then."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        act()

    threading.Thread(target=follow, name="parent", daemon=True).start()
