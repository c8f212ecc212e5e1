"""A run that everything happens to, and the same run in peace: both must end as the same run.

    python -m benchmarks.chaos [--faults 30] [--seed 1] [--steps 14] [--workers 1]

One run of the trainer is left alone. The other is disturbed by random faults, and started again by a loop like that of
a chain of jobs whenever it ends:

    while it runs       the engine killed, stopped (SIGSTOP) or out of memory, while it samples, takes weights, or has
                        nothing to do; with --workers 2 one of its vLLM workers, too: the run goes on
    what ends it        one rank, the launcher or all processes killed, asked to stop (SIGTERM), no room for a
                        checkpoint, no room for the metrics
    while it is down    a bit of the newest checkpoint flipped, a file of it cut short, one lost, half a line behind the
                        metrics

In both of them half of the environments are guests that fail (benchmarks/chaos_guests.py): they raise, hang, or return
what they should not.  A third, short run has them in processes of their own, which they may kill.

At the end every step must be there once, and all there is be equal, bit for bit: metrics (but times and the number of
engines replaced), rollouts of every step, exported weights, and the last checkpoint with optimiser, random streams and
all. No end may take longer than --patience seconds from the fault to the last process, and after each no process of
the run, no port, no folder and no file in /dev/shm may be left (if everything was killed at once: after the next
start). Exit status 1 if anything is otherwise. Which faults are drawn depends on the seed; the microsecond at which
they hit depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from benchmarks.chaos_rank import ENGINE, PHASES, WORKER, Life
from megatron_rest.commands.resume_check import kill_tree
from megatron_rest.commands.run_diff import Difference, compare_runs
from megatron_rest.commands.tiny import RANKS, make_base, tiny_settings
from megatron_rest.mcore import checkpoint_files
from megatron_rest.processes import mapped_segments, my_processes, start_of, variable_of

ROOT = Path(__file__).resolve().parents[1]
END = ("rank killed", "launcher killed", "job killed",
       "asked to stop", "no room for a checkpoint", "no room for metrics")  # fmt: skip
DOWN = ("bit flipped", "file cut short", "file lost", "half a line of metrics")
_ALL_PHASES = ("rollout", "reward", "score", "weights", "update", "sync", "checkpoint")
MAY_DIFFER = frozenset({"rollout/restarts"})
_HANG_SECONDS = 1800  # of one start, in which engines may be started eight times
_ENGINE_TIMEOUT = 15  # seconds without a sign of life until a stopped engine is replaced
_GONE_SECONDS = 20.0  # after the end of a run
_LOOK_SECONDS = 2.0
_GUEST_STEPS = 4  # of the run with deadly guests
_TOOL_SECONDS = 20.0  # of a call to an environment: on a busy machine only those that hang take so long
_MARKER = "CHAOS_LOG"
_OF_LAUNCHER = "torchelastic_"  # torchrun's, which a killed one cannot remove


def draw(rng: random.Random, num_faults: int, kinds: Sequence[str] = ENGINE) -> tuple[Life, list[str]]:
    """A life with at most ``num_faults`` faults, and what happens while the run is down after it."""
    engine = [rng.choice(kinds) for _ in range(min(rng.choice((0, 1, 1, 2)), num_faults - 1))]
    down = [rng.choice(DOWN) for _ in range(min(rng.choice((0, 1, 1, 2)), num_faults - 1 - len(engine)))]
    end, rank = rng.choice(END), rng.randrange(RANKS)
    life = Life(
        engine=engine,
        end=end,
        rank=0 if end == "no room for metrics" else rank,  # rank 0 writes them
        phase=rng.choice(_ALL_PHASES),
        delay=rng.choice((0.0, rng.random() * 0.2)),
        steps=rng.choice((0, 1, 1)),
    )
    return life, down


@dataclass
class Trace:
    """What a run's processes are and hold, seen while they live: nothing of it may be there afterwards."""

    marker: Path  # in the environment of each of them
    processes: dict[int, str] = field(default_factory=dict)  # and the tick at which each began
    segments: set[str] = field(default_factory=set)  # files in /dev/shm
    ports: set[int] = field(default_factory=set)  # that one of them listened at

    def look(self, root: psutil.Process) -> None:
        """Some of them overwrite their environment, so that they are found by their parents alone."""
        with suppress(psutil.NoSuchProcess):
            for process in (root, *root.children(recursive=True)):
                self.processes.setdefault(process.pid, start_of(process.pid))
        for pid in self.processes:
            self.segments |= mapped_segments(pid)
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid in self.processes:
                self.ports.add(connection.laddr.port)

    @contextmanager
    def watching(self, root: int) -> Iterator[None]:
        """Look again and again, from a thread."""
        over, process = threading.Event(), psutil.Process(root)

        def watch() -> None:
            while not over.wait(_LOOK_SECONDS):
                self.look(process)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def left(self) -> list[str]:
        """What is there still."""
        living = {pid for pid, began in self.processes.items() if began and start_of(pid) == began}
        living |= {pid for pid in my_processes() if variable_of(pid, _MARKER) == str(self.marker) and start_of(pid)}
        named = [f"process {pid}: {Path(f'/proc/{pid}/cmdline').read_text()[:80]!r}" for pid in living]
        listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        named += [f"port {port}" for port in self.ports & listening]
        return named + [path for path in self.segments if Path(path).exists()]


class Launched(Protocol):
    """A launcher that runs; as of :class:`subprocess.Popen`."""

    pid: int
    returncode: int | None

    def wait(self, timeout: float | None = None) -> int: ...


Launch = Callable[[list[str], Mapping[str, str], Path, int], Launched]
"""Starts a launcher with the rank's arguments, environment, where it prints to, and the number of ranks."""


def torchrun(settings: list[str], environment: Mapping[str, str], output: Path, ranks: int) -> Launched:
    """The real one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with output.open("w") as file:  # no pipe: what a dead launcher leaves may hold its end
        return subprocess.Popen(
            [*command, "-m", "benchmarks.chaos_rank", *settings], cwd=ROOT, env=environment, stdout=file, stderr=file
        )


def start(
    base: Path,
    run_dir: Path,
    *overrides: str,
    life: Life | None = None,
    ranks: int = RANKS,
    trace: Trace | None = None,
    launch: Launch = torchrun,
) -> tuple[int, str]:
    """One start of the run, as far as it comes; exit status and what it printed."""
    settings = [
        *tiny_settings(base),
        f"parallel.tensor_parallel={ranks}",
        f"trainer.run_dir={run_dir}",
        f"rollout.engine_timeout_seconds={_ENGINE_TIMEOUT}",
        "checkpoint.save_every=1",
        "checkpoint.keep_last=3",
        "checkpoint.asynchronous=true",
        "trainer.save_rollouts_every=1",
        *overrides,
    ]
    temporary, log = _temporary_of(run_dir), _log_of(run_dir)
    temporary.mkdir(exist_ok=True)
    paths = [str(ROOT / "benchmarks" / "oom_probe"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(temporary),
        _MARKER: str(log),
        "CHAOS_LIFE": json.dumps(asdict(life or Life())),
    }
    output = run_dir.with_name(run_dir.name + ".output")
    process = launch(settings, environment, output, ranks)
    try:
        with nullcontext() if trace is None else trace.watching(process.pid):
            status = process.wait(_HANG_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{run_dir.name} hangs: nothing has ended it for {_HANG_SECONDS} s") from error
    finally:
        if process.returncode is None:
            kill_tree(process)
    return status, output.read_text(errors="replace")


def train(base: Path, run_dir: Path, *overrides: str, ranks: int = RANKS, launch: Launch = torchrun) -> float:
    """An undisturbed run; returns its seconds.  Raises RuntimeError if it fails."""
    started = time.perf_counter()
    status, output = start(base, run_dir, *overrides, ranks=ranks, launch=launch)
    if status:
        raise RuntimeError(f"the undisturbed run ended with status {status}:\n{output[-6000:]}")
    return time.perf_counter() - started


@dataclass(kw_only=True)
class Chaos:
    """What happened to a run."""

    faults: Counter[str] = field(default_factory=Counter)
    seconds_to_end: dict[str, float] = field(default_factory=dict)  # the longest of each kind that ends the run
    cells: list[str] = field(default_factory=list)  # faults in their order, with the phase that ends came in
    num_starts: int = 0
    wrong: list[str] = field(default_factory=list)  # what must not have happened

    @property
    def num_faults(self) -> int:
        return self.faults.total()


def disturb(
    base: Path,
    run_dir: Path,
    *overrides: str,
    faults: int,
    seed: int,
    quiet: bool = False,
    kinds: Sequence[str] = ENGINE,
) -> Chaos:
    """Start the run again and again until ``faults`` faults have happened to it and it has come to its end."""
    rng, chaos = random.Random(seed), Chaos()
    while True:
        left = faults - chaos.num_faults
        life, down = draw(rng, left, kinds) if left > 0 else (Life(), [])
        status = live(chaos, base, run_dir, *overrides, life=life, quiet=quiet)
        if status == 0 or chaos.wrong:
            return chaos
        for kind in down:
            if spoil(run_dir, kind, rng):
                chaos.faults[kind] += 1
                if not quiet:
                    print(f"{chaos.num_faults:3d} faults: while it is down: {kind}", flush=True)


def live(
    chaos: Chaos,
    base: Path,
    run_dir: Path,
    *overrides: str,
    life: Life,
    ranks: int = RANKS,
    quiet: bool = False,
    launch: Launch = torchrun,
) -> int:
    """One start of the run and its end, with all that has to be so afterwards; returns its exit status."""
    before, trace = _happened(run_dir), Trace(_log_of(run_dir))
    status, output = start(base, run_dir, *overrides, life=life, ranks=ranks, trace=trace, launch=launch)
    new = _happened(run_dir)[len(before) :]
    happened = [kind for kind, _ in new]
    left = left_behind(run_dir, trace, is_swept_later="job killed" in happened)
    ended = time.time()
    chaos.num_starts += 1
    chaos.faults += Counter(happened)
    names = {name: phase for phase, name in PHASES.items()}
    chaos.cells += [f"{k} in {names.get(life.phase, life.phase)}" if k in END else k for k in happened]
    for kind, at in new:
        if kind in END:
            chaos.seconds_to_end[kind] = max(chaos.seconds_to_end.get(kind, 0.0), ended - at)
    _check_end(chaos, life, happened, status, output)
    chaos.wrong += left
    if not quiet:
        step = (checkpoint_files.latest(run_dir / "checkpoints") or Path("nothing")).name
        print(f"{chaos.num_faults:3d} faults: {', '.join(happened) or 'none'}; saved: {step}", flush=True)
    return status


def _check_end(chaos: Chaos, life: Life, new: list[str], status: int, output: str) -> None:
    """An end that nothing was done for, or that does not say why, is a failure of ours."""
    reasons = {"no room for a checkpoint": "No space left on device", "no room for metrics": "No space left on device",
               "asked to stop": "is saved; the same command continues"}  # fmt: skip
    if status and life.end not in new:
        chaos.wrong.append(f"the run ended with status {status} by itself:\n{output[-6000:]}")
    elif status and life.end in reasons and reasons[life.end] not in output:
        chaos.wrong.append(f"after {life.end!r} nobody said {reasons[life.end]!r}:\n{output[-6000:]}")


def left_behind(run_dir: Path, trace: Trace, *, is_swept_later: bool) -> list[str]:
    """What is there shortly after the end; of a run that was killed with everything, processes and ports only count."""
    temporary, deadline = _temporary_of(run_dir), time.monotonic() + _GONE_SECONDS
    while True:
        left = trace.left()
        if is_swept_later:
            left = [what for what in left if what.startswith(("process", "port"))]
        else:
            left += [str(path) for path in temporary.iterdir() if not path.name.startswith(_OF_LAUNCHER)]
        if not left or time.monotonic() > deadline:
            return [f"left behind: {what}" for what in left]
        time.sleep(0.1)


def _temporary_of(run_dir: Path) -> Path:
    return run_dir.with_name(run_dir.name + ".tmp")


def spoil(run_dir: Path, kind: str, rng: random.Random) -> bool:
    """Damage what a run left; False if there is nothing that it could do without."""
    if kind == "half a line of metrics":
        path = run_dir / "metrics.jsonl"
        if not path.is_file():
            return False
        with path.open("ab") as file:
            file.write(b'{"step": 99, "metr')
        return True
    whole = checkpoint_files.complete(run_dir / "checkpoints")
    whole = [path for path in whole if not checkpoint_files.damage(path)]
    if len(whole) < 2:  # the last good one: nobody promises anything then
        return False
    victim = whole[-1] / rng.choice(checkpoint_files.files_of(whole[-1]))
    data = bytearray(victim.read_bytes())
    if kind == "file lost":
        victim.unlink()
    elif kind == "file cut short":
        victim.write_bytes(data[: len(data) // 2])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
    return True


def differences(calm: Path, disturbed: Path, *, steps: int) -> list[Difference]:
    """What is not equal between two runs; empty if all is."""
    return compare_runs(calm, disturbed, step=steps, but=MAY_DIFFER).differences


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of every step."""
    return [json.loads(line)["metrics"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _log_of(run_dir: Path) -> Path:
    return run_dir.with_name(run_dir.name + ".chaos")


def _happened(run_dir: Path) -> list[tuple[str, float]]:
    path = _log_of(run_dir)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(kind, at) for kind, at in rows]


GUESTS = (
    "rollout.environment=benchmarks.chaos_guests:Guest",
    "rollout.max_turns=2",
    f"rollout.tool_timeout_seconds={_TOOL_SECONDS}",
)
"""Settings with environments half of which fail."""

DEADLY_GUESTS = (*GUESTS, "rollout.environment_workers=2", "rollout.environment_arguments.deadly=true")


def with_deadly_guests(base: Path, run_dir: Path, *overrides: str, steps: int) -> list[str]:
    """A run whose environments kill the processes they are in; what is wrong with it.

    Who shares a process with a deadly guest depends on time, so this run equals no other one.
    """
    chaos = Chaos()
    status = live(chaos, base, run_dir, *overrides, *DEADLY_GUESTS, f"trainer.steps={steps}", life=Life(), quiet=True)
    rows = metrics_of(run_dir) if status == 0 else []
    if [row["rollout/count"] for row in rows] != [24] * steps:
        chaos.wrong.append(f"{len(rows)} of {steps} steps are whole")
    for reason in ("tool_failed", "tool_timeout", "length"):
        if not any(row.get(f"stop/{reason}") for row in rows):
            chaos.wrong.append(f"no rollout ended with {reason}: the guests were not there")
    return chaos.wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="how many happen (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (%(default)s)")
    parser.add_argument("--steps", type=int, default=14, help="RL steps of both runs (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="vLLM processes of the engine (%(default)s)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds from a fault to the end (%(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        base = make_base(Path(folder))
        calm, disturbed = base / "calm", base / "disturbed"
        settings = (f"trainer.steps={args.steps}", f"rollout.tensor_parallel={args.workers}", *GUESTS)
        seconds = train(base, calm, *settings)
        print(f"undisturbed: {args.steps} steps in {seconds:.0f} s", flush=True)
        started = time.perf_counter()
        kinds = ENGINE if args.workers == 1 else ENGINE + WORKER
        chaos = disturb(base, disturbed, *settings, faults=args.faults, seed=args.seed, kinds=kinds)
        wrong = chaos.wrong
        if chaos.num_faults < args.faults:
            wrong.append(f"only {chaos.num_faults} of {args.faults} faults found an occasion: more --steps")
        wrong += [
            f"{kind}: {s:.0f} s to the end, more than --patience"
            for kind, s in chaos.seconds_to_end.items()
            if s > args.patience
        ]
        if not chaos.wrong:
            wrong += map(str, differences(calm, disturbed, steps=args.steps))
        print(f"disturbed: {chaos.num_starts} starts, {time.perf_counter() - started:.0f} s")
        for kind, count in sorted(chaos.faults.items()):
            longest = chaos.seconds_to_end.get(kind)
            print(f"  {count:3d} x {kind}" + (f"; ended {longest:.1f} s later at most" if longest else ""))
        found = with_deadly_guests(base, base / "guests", steps=_GUEST_STEPS)
        print(f"environments in processes of their own, which they kill: {'; '.join(found) or 'as promised'}")
        wrong += found
        print("\n".join(wrong) or "every step is there once, and all is equal, bit for bit")
        return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
