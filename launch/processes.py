"""End a process with everything below it.  Reads /proc: a launch-only installation has no psutil."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

__all__ = ["GRACE_SECONDS", "Interrupted", "descendants", "raise_on_signals", "stop_tree"]

GRACE_SECONDS = 30.0
"""Time between SIGTERM and SIGKILL, as much as torchrun allows its ranks: they finish their step and save it."""


class Interrupted(BaseException):
    """A signal arrived; not an Exception, so that nothing on the way takes it for a failed job."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def raise_on_signals() -> Callable[[], None]:
    """SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`; call the result to put the old handlers back."""

    def handler(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    old = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def restore() -> None:
        for signum, previous in old.items():
            signal.signal(signum, previous)

    return restore


def stop_tree(
    pid: int,
    *,
    is_alive: Callable[[], bool],
    meanwhile: Callable[[], None] = lambda: time.sleep(0.05),
    grace: float = GRACE_SECONDS,
) -> None:
    """SIGTERM to ``pid``; SIGKILL to what is left of its process tree after ``grace`` seconds or a second signal.

    The tree is noted down before anything dies: orphans change their parent, and torchrun gives every rank a session of
    its own, so that neither parent nor process group finds them afterwards.
    """
    tree = descendants(pid)
    with contextlib.suppress(Interrupted):
        if is_alive():
            _send(pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while is_alive() and time.monotonic() < deadline:
            tree |= descendants(pid)
            meanwhile()
    if is_alive():
        _send(pid, signal.SIGKILL)
    for victim, started in tree.items():
        if _start_time(victim) == started:  # else the number has been given to somebody else
            _send(victim, signal.SIGKILL)


def descendants(pid: int) -> dict[int, str]:
    """Processes below ``pid`` with their start times."""
    stats = {int(entry.name): _stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found: dict[int, str] = {}
    frontier = {pid}
    while frontier:
        frontier = {p for p, stat in stats.items() if stat and int(stat[1]) in frontier and p not in found}
        found |= {p: stats[p][19] for p in frontier}
    return found


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat after the command name: [0] state, [1] parent, [19] start time; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _start_time(pid: int) -> str:
    stat = _stat(pid)
    return stat[19] if stat and stat[0] != "Z" else ""


def _send(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)
