"""A rank of the run that ``benchmarks.chaos`` disturbs: ``torchrun -m benchmarks.chaos_rank section.key=value ...``.

It trains as any other, and does to itself or to its engine what CHAOS_LIFE says; a line about each fault goes to
CHAOS_LOG.
"""

from __future__ import annotations

from megatron_rest.rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # environment that torch and vLLM read when they are imported

import errno
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

__all__ = ["ENGINE", "WORKER", "Life"]

ENGINE = ("engine killed in generation", "engine killed in a transfer", "engine stopped")
WORKER = ("worker of an engine killed", "worker of an engine stopped")  # of an engine with several
_ROLLOUTS_BEFORE = 3  # handed over before an engine is killed in the middle of generation
_SYNC_SECONDS = 0.005  # after the first byte may have been sent; a transfer of the toy takes some 30 ms


@dataclass(frozen=True, kw_only=True)
class Life:
    """What happens between a start and the next end of the run."""

    engine: list[str] = field(default_factory=list)  # in this order, each at the first occasion
    end: str = ""  # then this; "" = nothing ends it
    rank: int = 0  # that it happens to
    phase: str = "rollout"
    delay: float = 0.0  # seconds after the phase began
    steps: int = 0  # that pass before


class _Saboteur:
    """Does to this rank, or to its engine, what its life says."""

    def __init__(self, life: Life, log: Path, rank: int) -> None:
        self.life = life
        self.log = log
        self.rank = rank
        self.engine_due = list(life.engine) if rank == 0 else []  # rank 0 has the engine
        self.before = len(_lines(log))
        self.first_step: int | None = None
        self.is_over = not life.end or rank != life.rank

    def note(self, kind: str) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps([kind, time.time()]) + "\n")

    def install(self) -> None:
        from megatron_rest.rollout.remote import RemoteEngine
        from megatron_rest.trainer.watch import Watch

        run, update, enter = RemoteEngine.run, RemoteEngine.update_weights, Watch.enter
        saboteur = self

        def disturbed_run(engine: RemoteEngine, requests: Any, *, on_rollout: Any, **others: Any) -> None:
            due = saboteur.engine_due[:1]
            is_due = bool(due) and due[0] != ENGINE[1] and len(requests) > _ROLLOUTS_BEFORE
            if is_due:
                saboteur.engine_due.pop(0)
            handed: list[int] = []

            def take(key: int, rollout: Any) -> None:
                on_rollout(key, rollout)
                handed.append(key)
                if is_due and len(handed) == _ROLLOUTS_BEFORE:
                    saboteur.signal_engine(engine, due[0])

            run(engine, requests, on_rollout=take, **others)

        def disturbed_update(engine: RemoteEngine, update_info: dict[str, Any]) -> None:
            if saboteur.engine_due[:1] == [ENGINE[1]]:
                saboteur.engine_due.pop(0)
                threading.Timer(_SYNC_SECONDS, saboteur.signal_engine, (engine, ENGINE[1])).start()
            update(engine, update_info)

        def watched(watch: Watch, step: int, phase: str) -> None:
            enter(watch, step, phase)
            saboteur.phase_begins(step, phase)

        RemoteEngine.run, RemoteEngine.update_weights = disturbed_run, disturbed_update  # type: ignore[method-assign]
        Watch.enter = watched  # type: ignore[method-assign]

    def signal_engine(self, engine: Any, kind: str) -> None:
        self.note(kind)
        pid = engine.pid
        if kind in WORKER:
            below = psutil.Process(pid).children(recursive=True)
            pid = next(process.pid for process in below if "Worker" in process.name())
        os.kill(pid, signal.SIGSTOP if "stopped" in kind else signal.SIGKILL)

    def phase_begins(self, step: int, phase: str) -> None:
        if self.is_over or phase != self.life.phase:
            return
        if len(_lines(self.log)) < self.before + len(self.life.engine):
            return  # the engine's turn comes first
        self.first_step = step if self.first_step is None else self.first_step
        if step < self.first_step + self.life.steps:
            return
        self.is_over = True
        threading.Timer(self.life.delay, self.end).start()

    def end(self) -> None:
        self.note(self.life.end)
        match self.life.end:
            case "rank killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "job killed":
                launcher = psutil.Process(os.getppid())
                for process in (launcher, *launcher.children(recursive=True)):
                    if process.pid != os.getpid():
                        process.kill()
                os.kill(os.getpid(), signal.SIGKILL)
            case "asked to stop":
                os.kill(os.getpid(), signal.SIGTERM)
            case "no room for a checkpoint":
                os.fsync = _no_room_for("checkpoints", os.fsync)
            case "no room for metrics":
                os.write = _no_room_for("metrics.jsonl", os.write)


def _no_room_for(part: str, call: Any) -> Any:
    """``call(descriptor, ...)`` that fails for files whose path holds ``part``, in forked processes, too."""

    def failing(descriptor: int, *arguments: Any) -> Any:
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), part)
        return call(descriptor, *arguments)

    return failing


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def worker(settings: list[str]) -> int:
    """A training rank."""
    from megatron_rest.trainer.entry import worker_main
    from megatron_rest.trainer.run import train as run_training

    life = Life(**json.loads(os.environ["CHAOS_LIFE"]))
    if life.engine or life.end:
        _Saboteur(life, Path(os.environ["CHAOS_LOG"]), int(os.environ["RANK"])).install()
    return worker_main(run_training, None, settings)


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1:]))
