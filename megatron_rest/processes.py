"""Processes of this machine by what /proc says of them, and those that run code of the user's.

Standard library only; a process that is gone is no error.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["mapped_segments", "my_processes", "session_of", "space", "start_of", "start_worker", "variable_of"]

_PROC = Path("/proc")
_SHM = "/dev/shm/"
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
    """``python -m module`` that finds what this process finds, with pipes for lines of JSON; its errors are ours."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
