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

__all__ = ["ENGINE", "PHASES", "WORKER", "Life"]

PHASES = {"rollout": "rollout", "transfer": "sync", "update": "update", "save": "checkpoint"}
"""Where an engine may be lost, and the phase of a step that it is."""

ENGINE = (
    *(f"engine killed in {phase}" for phase in PHASES),
    "engine stopped in rollout",
    "engine stopped in update",
    "engine out of memory in rollout",
    "engine out of memory in transfer",
)
WORKER = (  # of an engine with several
    *(f"worker killed in {phase}" for phase in PHASES),
    "worker stopped in rollout",
    "worker stopped in update",
    "worker out of memory in rollout",
)
_SIGNALS = {
    "killed": signal.SIGKILL,
    "stopped": signal.SIGSTOP,
    "out of memory": signal.SIGUSR1,
}  # benchmarks/oom_probe
_ROLLOUTS_BEFORE = 3  # handed over before an engine is lost in the middle of generation
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
        self.engine: Any = None  # of this rank, if it is a process of its own

    def note(self, kind: str) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps([kind, time.time()]) + "\n")

    def install(self) -> None:
        from megatron_rest.rollout.remote import RemoteEngine
        from megatron_rest.trainer.watch import Watch

        run, update, enter = RemoteEngine.run, RemoteEngine.update_weights, Watch.enter
        saboteur = self

        def disturbed_run(engine: RemoteEngine, requests: Any, *, on_rollout: Any, **others: Any) -> None:
            saboteur.engine = engine
            due = saboteur.take_due("rollout") if len(requests) > _ROLLOUTS_BEFORE else ""
            handed: list[int] = []

            def take(key: int, rollout: Any) -> None:
                on_rollout(key, rollout)
                handed.append(key)
                if due and len(handed) == _ROLLOUTS_BEFORE:
                    saboteur.strike(due)

            try:
                run(engine, requests, on_rollout=take, **others)
            finally:
                if due and len(handed) < _ROLLOUTS_BEFORE:  # it was lost already, or had so few left
                    saboteur.engine_due.insert(0, due)

        def disturbed_update(engine: RemoteEngine, update_info: dict[str, Any]) -> None:
            saboteur.engine = engine
            if due := saboteur.take_due("transfer"):
                threading.Timer(_SYNC_SECONDS, saboteur.strike, (due,)).start()
            update(engine, update_info)

        def watched(watch: Watch, step: int, phase: str) -> None:
            enter(watch, step, phase)
            for name in ("update", "save"):  # the engine has nothing to do in them
                if phase == PHASES[name] and saboteur.engine is not None and (due := saboteur.take_due(name)):
                    saboteur.strike(due)
            saboteur.phase_begins(step, phase)

        RemoteEngine.run, RemoteEngine.update_weights = disturbed_run, disturbed_update  # type: ignore[method-assign]
        Watch.enter = watched  # type: ignore[method-assign]

    def take_due(self, phase: str) -> str:
        """What is due for the engine, if it is so in this phase."""
        if self.engine_due and self.engine_due[0].endswith(f" in {phase}"):
            return self.engine_due.pop(0)
        return ""

    def strike(self, kind: str) -> None:
        """Signal the engine, or a worker of it; another time if it is dead by itself."""
        who, _, how = kind.partition(" ")
        pid = self.engine.pid
        try:
            if who == "worker":
                below = psutil.Process(pid).children(recursive=True)
                pid = next(process.pid for process in below if "Worker" in process.name())
            os.kill(pid, _SIGNALS[how.partition(" in ")[0]])
        except (ProcessLookupError, psutil.NoSuchProcess, StopIteration):
            self.engine_due.insert(0, kind)
        else:
            self.note(kind)

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
            case "launcher killed":
                os.kill(os.getppid(), signal.SIGKILL)
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
