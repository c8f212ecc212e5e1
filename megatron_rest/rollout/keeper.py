"""An engine's processes end with their owner, however it goes, and nothing of them stays.  Standard library only.

    owner    starts the engine's worker in a session of its own and with a temporary folder of its own, and beside it
             a keeper: python -m megatron_rest.rollout.keeper FOLDER SESSION OWNER
    keeper   notes every few seconds which files in /dev/shm the engine has mapped; when the owner is gone it ends what
             is left of the engine and removes what that left

A worker cannot do that for itself: it may be stopped, or killed before its owner, and what vLLM has started under it
would stay.  What belongs to an engine is known by its session, and by its environment, which names the folder and which
children inherit (vLLM's overwrite theirs with a title).  If everything is killed at once, the keeper too, the next
engine that starts on the machine removes what is left (:func:`sweep`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megatron_rest.processes import (
    is_resource_tracker,
    mapped_segments,
    my_processes,
    session_of,
    space,
    start_of,
    variable_of,
)

__all__ = [
    "FOLDER",
    "SHARED_BY_WORKERS",
    "EngineProcesses",
    "end_all",
    "end_processes",
    "keep_own_segments",
    "new_engine_folder",
    "own_engine_folder",
    "sweep",
]

FOLDER = "REST_ENGINE_FOLDER"
"""Environment variable of an engine's processes: their temporary folder."""

SHARED_BY_WORKERS = "vllm_dist_"
"""How names of the memory begin that vLLM's workers on CPU share: vLLM's own after a file in their temporary folder."""

_PREFIX = "engine-"
_RECORD = "keeper.json"
_SHM = Path("/dev/shm")
_WATCH_SECONDS = 0.5  # between looks at the owner
_LOOK_SECONDS = 5.0  # between looks at the engine's shared memory
_END_SECONDS = 30.0  # for processes that were killed: a driver may hold them
_TRACKER_SECONDS = 10.0  # of these, before resource trackers are killed, too
_POLL_SECONDS = 0.01
_YOUNG_SECONDS = 120.0  # what is younger may belong to somebody who just starts

_living: dict[Path, int] = {}  # folder and session of the engines that this process has started
_own_segments: set[Path] = set()  # of engines inside this process
_swept: list[bool] = []


class EngineProcesses:
    """An engine's worker, what it starts, and the keeper beside it.

    Args:
        command: of the worker.
        folder: of :func:`new_engine_folder`; the engine's, and removed with it.
        environment: of the worker; the folder is added.
        descriptors: that the worker inherits.
        output: where the worker prints to, as for Popen; None: where this process does.
    """

    def __init__(
        self,
        command: list[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        descriptors: Iterable[int],
        output: int | None = None,
    ) -> None:
        self._folder = folder
        self._worker = subprocess.Popen(
            command,
            pass_fds=tuple(descriptors),
            env={**environment, FOLDER: str(folder), "TMPDIR": str(folder)},
            start_new_session=True,  # Ctrl-C is the owner's business; and a session is ended as a whole
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        )
        _living[folder] = self._worker.pid
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(self._worker.pid), str(os.getpid())],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._worker.pid

    @property
    def output(self) -> IO[bytes] | None:
        return self._worker.stdout

    def poll(self) -> int | None:
        """The worker's exit status; None while it lives."""
        return self._worker.poll()

    def wait(self, seconds: float) -> None:
        """For an end of the worker that was asked for."""
        with suppress(subprocess.TimeoutExpired):
            self._worker.wait(seconds)

    def end(self) -> None:
        """End all of them and remove what they left.  Idempotent."""
        end_processes(self._folder, self.pid)
        _living.pop(self._folder, None)
        self.wait(_END_SECONDS)
        self._keeper.kill()
        self._keeper.wait()


def new_engine_folder() -> Path:
    """A temporary folder for one engine.  The first removes what dead runs of this user have left on the machine."""
    if not _swept:
        _swept.append(True)
        sweep()
    return Path(tempfile.mkdtemp(prefix=_PREFIX))


def own_engine_folder() -> Path | None:
    """What the process that started this worker made for it."""
    return Path(os.environ[FOLDER]) if FOLDER in os.environ else None


def end_all() -> None:
    """End every engine that this process has started; for its own end.  May be called by a signal handler."""
    for folder, session in list(_living.items()):
        end_processes(folder, session)
    for path in _own_segments:
        with suppress(OSError):
            path.unlink()


def end_processes(folder: Path, session: int = 0) -> None:
    """SIGKILL to all processes of the engine with this folder and session, this one excepted, and what they left in the
    file system with them.  Returns when they are gone, or after half a minute.

    Python's resource trackers are left for last: when the processes they track are gone, they remove shared memory that
    nobody has mapped any more, and end.
    """
    segments = set(_recorded(folder).get("segments", ()))
    deadline = time.monotonic() + _END_SECONDS
    while (members := _members(folder, session)) and time.monotonic() < deadline:
        for pid in members:
            segments |= mapped_segments(pid)
        tracked = [pid for pid in members if not is_resource_tracker(pid)]
        is_patient = time.monotonic() < deadline - _END_SECONDS + _TRACKER_SECONDS
        for pid in tracked or ([] if is_patient else members):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    stores = [path.name for path in folder.glob(f"{SHARED_BY_WORKERS}*")]
    segments |= {str(path) for store in stores for path in _SHM.glob(f"{store}-*")}
    _remove(segments)
    shutil.rmtree(folder, ignore_errors=True)


def keep_own_segments(before: Set[str]) -> None:
    """Of an engine inside this process, which has no keeper: what was mapped in /dev/shm since ``before``.

    What vLLM's workers on CPU share loses its name now: whoever needs it has it mapped, and without a name it goes with
    the last of them, however that ends.  Python's own (``psm_``) keep it, because they are closed by name;
    :func:`end_all` removes them, and the resource tracker of a process that is killed.
    """
    for path in map(Path, mapped_segments(os.getpid()) - before):
        if path.name.startswith(SHARED_BY_WORKERS):
            path.unlink(missing_ok=True)
        else:
            _own_segments.add(path)


def sweep() -> None:
    """Remove what engines of dead owners have left on this machine: processes, folders, shared memory."""
    now = time.time()
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            status = folder.stat()
            if status.st_uid == os.getuid() and _is_abandoned(folder, now - status.st_mtime):
                end_processes(folder, _session_of(_recorded(folder)))
    old = set()
    for path in _SHM.glob(f"{SHARED_BY_WORKERS}*"):  # of engines inside ranks that were killed while they made it
        with suppress(OSError):
            if now - path.stat().st_mtime > _YOUNG_SECONDS:
                old.add(str(path))
    _remove(old)


def _is_abandoned(folder: Path, age: float) -> bool:
    record = _recorded(folder)
    if not record:
        return age > _YOUNG_SECONDS
    boot, _, _ = space().partition(" ")
    if record["space"] != space():  # before the last start of the machine, or in a container that cannot be seen
        return not str(record["space"]).startswith(boot)
    return start_of(record["owner"]) != record["owner_started"]


def _session_of(record: dict[str, Any]) -> int:
    """The recorded session if it may still be that one; 0 if its number belongs to somebody else by now."""
    if record.get("space") != space() or start_of(record["session"]) not in ("", record["session_started"]):
        return 0
    return int(record["session"])  # a number is not used again while a process of the session lives


def _members(folder: Path, session: int) -> list[int]:
    """Living processes of an engine, without this one."""
    me, name = os.getpid(), str(folder)
    return [
        pid
        for pid in my_processes()
        if pid != me
        and ((session and session_of(pid) == session) or variable_of(pid, FOLDER) == name)
        and start_of(pid)
    ]


def _remove(segments: set[str]) -> None:
    """Unlink files of this user in /dev/shm that nobody has mapped."""
    if not segments:
        return
    in_use = {segment for pid in my_processes() for segment in mapped_segments(pid)}
    for path in map(Path, segments - in_use):
        with suppress(OSError):
            if path.parent == _SHM and path.stat().st_uid == os.getuid():
                path.unlink()


def _recorded(folder: Path) -> dict[str, Any]:
    """What the keeper noted; empty if it did not, or not as it should."""
    kinds = {"space": str, "owner": int, "owner_started": str, "session": int, "session_started": str, "segments": list}
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return record if {k: type(v) for k, v in record.items()} == kinds else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _keep(folder: Path, session: int, owner: int) -> None:
    started = start_of(owner)
    record = {"space": space(), "owner": owner, "owner_started": started}
    record |= {"session": session, "session_started": start_of(session)}
    known: set[str] = set()
    noted: set[str] | None = None
    looked = -math.inf
    while started and start_of(owner) == started:
        if known != noted:
            with suppress(OSError):  # the folder is gone with the engine: the owner will say what comes next
                partial = folder / f"{_RECORD}.partial"
                partial.write_text(json.dumps(record | {"segments": sorted(known)}), encoding="utf-8")
                partial.replace(folder / _RECORD)
            noted = set(known)
        time.sleep(_WATCH_SECONDS)
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            for pid in _members(folder, session):
                known |= mapped_segments(pid)
    end_processes(folder, session)


def main(argv: list[str]) -> None:
    """Keep the engine with folder ``argv[0]`` and session ``argv[1]`` until process ``argv[2]`` is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its owner, and after the engine
    _keep(Path(argv[0]), int(argv[1]), int(argv[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
