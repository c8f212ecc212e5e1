"""Who is where, and who is missing: a collective that fails says which rank it waited for.

A collective only knows that nobody came.  So each rank tells the job's key-value store (c10d's, which torchrun or rank
0 keeps) every few seconds that it lives, and in which phase of which step it is since when.  A rank whose collective
fails reads what the others said last, and adds it to the error:

    rank 1 waited in all_reduce (trainer/fleet.py:301) in phase 'sync' of step 7
    rank 0: sync of step 7 for 64 s
    rank 2: NO SIGN OF LIFE for 61 s, was in update of step 7 on node-3 (process 4711)

A rank that is slow, stopped or stuck in its own code is told from one that waits: its phase, or the time since its last
sign.  Half-way to the limit the same is said as a warning, by the first rank that lives.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_rest.help_topics import Topic, see

__all__ = ["Sign", "Watch", "describe", "where_it_failed"]

_log = logging.getLogger(__name__)

_BEAT_SECONDS = 2.0
_SILENT_SECONDS = 4 * _BEAT_SECONDS  # a busy machine delays a thread by a second or two
_WARN_SHARE = 0.5  # of the time limit
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
_LOGGER = os.path.join("torch", "distributed", "c10d_logger.py")  # wrapped around every collective


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """A rank's sign of life."""

    step: int
    phase: str
    phase_seconds: float  # for how long it was in it when it gave the sign
    time: float  # of the clock of its machine; ages of seconds matter, so clocks may differ by about one
    host: str
    pid: int


class Watch:
    """Gives signs of life inside its ``with`` block, and explains failures that leave it.

    Args:
        rank: this one.
        world_size: ranks of the job.
        limit_seconds: after which a collective ends the run (``trainer.timeout_minutes``).
    """

    def __init__(self, *, rank: int, world_size: int, limit_seconds: float) -> None:
        self._rank = rank
        self._world_size = world_size
        self._limit = limit_seconds
        self._at = (0, "start", time.monotonic())
        self._warned_of: tuple[int, str] | None = None
        self._stop = threading.Event()
        # A connection of its own: the main thread may block in the other one.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("megatron_rest/watch", store.clone())
        self._thread = threading.Thread(target=self._beat, name="watch", daemon=True)

    def enter(self, step: int, phase: str) -> None:
        """The main thread begins a phase; costs no communication."""
        self._at = (step, phase, time.monotonic())

    def signs(self) -> dict[int, Sign]:
        """The last sign of each rank that has given one."""
        found = {}
        for rank in range(self._world_size):
            if self._store.check([str(rank)]):
                found[rank] = Sign(**json.loads(self._store.get(str(rank))))
        return found

    def __enter__(self) -> Watch:
        self._give_sign()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        step, phase, _ = self._at
        if error is not None:  # those who wait for this rank learn that it is gone, and why
            self.enter(step, f"{phase} (ended by {type(error).__name__})")
            with contextlib.suppress(RuntimeError):  # the store may be gone as well
                self._give_sign()
        if isinstance(error, RuntimeError) and (operation := where_it_failed(error)):
            error.add_note(f"rank {self._rank} waited in {operation} in phase {phase!r} of step {step}")
            for line in self._others():
                error.add_note(line)

    def _others(self) -> list[str]:
        try:
            return describe(self.signs(), now=time.time(), world_size=self._world_size, but=self._rank)
        except RuntimeError as error:  # the store went with rank 0 or torchrun
            return [f"what the other ranks did last is not known: the job's store is gone ({_first_line(error)})"]

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            try:
                self._give_sign()
                self._warn()
            except RuntimeError:  # the store is gone, and so is the run
                return

    def _give_sign(self) -> None:
        step, phase, since = self._at
        sign = Sign(
            step=step,
            phase=phase,
            phase_seconds=time.monotonic() - since,
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self._store.set(str(self._rank), json.dumps(asdict(sign)))

    def _warn(self) -> None:
        step, phase, since = self._at
        seconds = time.monotonic() - since
        if seconds < _WARN_SHARE * self._limit or self._warned_of == (step, phase):
            return
        signs, now = self.signs(), time.time()
        living = [rank for rank, sign in signs.items() if now - sign.time < _SILENT_SECONDS]
        if self._rank == min(living, default=self._rank):
            self._warned_of = (step, phase)
            lines = describe(signs, now=now, world_size=self._world_size, but=self._rank)
            head = f"step {step} is in {phase} for {seconds:.0f} s; a collective that takes {self._limit:.0f} s ends it"
            head += see(Topic.HANG)
            _log.warning("\n  ".join([head, *lines]))


def describe(signs: dict[int, Sign], *, now: float, world_size: int, but: int) -> list[str]:
    """A line a rank, those of which nothing is heard first; ranks that do the same share a line."""
    silent: list[str] = []
    living: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for rank in range(world_size):
        if rank == but:
            continue
        sign = signs.get(rank)
        if sign is None:
            silent.append(f"rank {rank}: has never given a sign of life")
        elif now - sign.time > _SILENT_SECONDS:
            silent.append(
                f"rank {rank}: NO SIGN OF LIFE for {now - sign.time:.0f} s, was in {sign.phase} of step {sign.step} "
                f"on {sign.host} (process {sign.pid})"
            )
        else:
            living.setdefault((sign.step, sign.phase), []).append((rank, now - sign.time + sign.phase_seconds))
    lines = []
    for (step, phase), ranks in sorted(living.items()):
        names = ", ".join(str(rank) for rank, _ in ranks)
        lines.append(f"rank {names}: {phase} of step {step} for {max(s for _, s in ranks):.0f} s")
    return silent + lines


def where_it_failed(error: BaseException) -> str:
    """The collective of torch.distributed that raised, and who called it; empty if none did."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [i for i, frame in enumerate(frames) if frame.filename.endswith(_COLLECTIVES)]
    if not inside:
        return ""
    names = [frames[i].name for i in inside if frames[i].name != "wrapper"]
    caller = next(frame for frame in reversed(frames[: inside[0]]) if not frame.filename.endswith(_LOGGER))
    return f"{names[0] if names else 'a collective'} ({'/'.join(caller.filename.split(os.sep)[-2:])}:{caller.lineno})"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
