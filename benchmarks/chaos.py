"""A run that everything happens to, and the same run in peace: both must end as the same run.

    python -m benchmarks.chaos [--faults 30] [--seed 1] [--steps 14] [--workers 1]

One run of the trainer is left alone. The other is disturbed by random faults, and started again by a loop like that of
a chain of jobs whenever it ends:

    while it runs       engine killed while it samples, engine killed in the middle of a weight transfer, engine stopped
                        (SIGSTOP) while it samples; with --workers 2 a worker of it killed or stopped, too: the run goes
                        on
    what ends it        one rank killed, all processes killed, asked to stop (SIGTERM), no room for a checkpoint, no
                        room for the metrics
    while it is down    a bit of the newest checkpoint flipped, a file of it cut short, one lost, half a line behind the
                        metrics

At the end every step must be there once, and all there is be equal, bit for bit: metrics (but times and the number of
engines replaced), rollouts of every step, exported weights, and the last checkpoint with optimiser, random streams and
all. No end may take longer than --patience seconds from the fault to the last process, and after each no process of an
engine, no folder and no file in /dev/shm may be left (if everything was killed at once: after the next start). Exit
status 1 if anything is otherwise. Which faults are drawn depends on the seed; the microsecond at which they hit depends
on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_rank import ENGINE, WORKER, Life
from megatron_rest.commands.resume_check import kill_tree
from megatron_rest.commands.run_diff import Difference, compare_runs
from megatron_rest.commands.tiny import RANKS, make_base, tiny_settings
from megatron_rest.mcore import checkpoint_files
from megatron_rest.processes import my_processes, variable_of
from megatron_rest.rollout.keeper import FOLDER

ROOT = Path(__file__).resolve().parents[1]
END = ("rank killed", "job killed", "asked to stop", "no room for a checkpoint", "no room for metrics")
DOWN = ("bit flipped", "file cut short", "file lost", "half a line of metrics")
PHASES = ("rollout", "reward", "score", "weights", "update", "sync", "checkpoint")
MAY_DIFFER = frozenset({"rollout/restarts"})
_HANG_SECONDS = 600  # of one start
_ENGINE_TIMEOUT = 15  # seconds without a sign of life until a stopped engine is replaced
_GONE_SECONDS = 10.0  # after the end of a run


def draw(rng: random.Random, num_faults: int, kinds: Sequence[str] = ENGINE) -> tuple[Life, list[str]]:
    """A life with at most ``num_faults`` faults, and what happens while the run is down after it."""
    engine = [rng.choice(kinds) for _ in range(min(rng.choice((0, 1, 1, 2)), num_faults - 1))]
    down = [rng.choice(DOWN) for _ in range(min(rng.choice((0, 1, 1, 2)), num_faults - 1 - len(engine)))]
    end, rank = rng.choice(END), rng.randrange(RANKS)
    life = Life(
        engine=engine,
        end=end,
        rank=0 if end == "no room for metrics" else rank,  # rank 0 writes them
        phase=rng.choice(PHASES),
        delay=rng.choice((0.0, rng.random() * 0.2)),
        steps=rng.choice((0, 1, 1)),
    )
    return life, down


def start(base: Path, run_dir: Path, *overrides: str, life: Life | None = None, ranks: int = RANKS) -> tuple[int, str]:
    """One start of the run under torchrun, as far as it comes; exit status and what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "benchmarks.chaos_rank"]  # fmt: skip
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
    temporary = _temporary_of(run_dir)
    temporary.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "TMPDIR": str(temporary),
        "CHAOS_LOG": str(_log_of(run_dir)),
        "CHAOS_LIFE": json.dumps(asdict(life or Life())),
    }
    with subprocess.Popen(
        [*command, *settings], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=_HANG_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{run_dir.name} hangs: nothing has ended it for {_HANG_SECONDS} s") from error
        finally:
            kill_tree(process)
    return process.returncode, output


def train(base: Path, run_dir: Path, *overrides: str, ranks: int = RANKS) -> float:
    """An undisturbed run; returns its seconds.  Raises RuntimeError if it fails."""
    started = time.perf_counter()
    status, output = start(base, run_dir, *overrides, ranks=ranks)
    if status:
        raise RuntimeError(f"the undisturbed run ended with status {status}:\n{output[-6000:]}")
    return time.perf_counter() - started


@dataclass(kw_only=True)
class Chaos:
    """What happened to a run."""

    faults: Counter[str] = field(default_factory=Counter)
    seconds_to_end: dict[str, float] = field(default_factory=dict)  # the longest of each kind that ends the run
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
        before, shared = _happened(run_dir), _shared_memory()
        status, output = start(base, run_dir, *overrides, life=life)
        ended = time.time()
        chaos.num_starts += 1
        new = _happened(run_dir)[len(before) :]
        chaos.faults += Counter(kind for kind, _ in new)
        for kind, at in new:
            if kind in END:
                chaos.seconds_to_end[kind] = max(chaos.seconds_to_end.get(kind, 0.0), ended - at)
        _check_end(chaos, life, [kind for kind, _ in new], status, output)
        chaos.wrong += left_behind(run_dir, shared, is_swept_later="job killed" in [kind for kind, _ in new])
        if not quiet:
            step = (checkpoint_files.latest(run_dir / "checkpoints") or Path("nothing")).name
            print(f"{chaos.num_faults:3d} faults: {', '.join(k for k, _ in new) or 'none'}; saved: {step}", flush=True)
        if status == 0 or chaos.wrong:
            return chaos
        for kind in down:
            if spoil(run_dir, kind, rng):
                chaos.faults[kind] += 1
                if not quiet:
                    print(f"{chaos.num_faults:3d} faults: while it is down: {kind}", flush=True)


def _check_end(chaos: Chaos, life: Life, new: list[str], status: int, output: str) -> None:
    """An end that nothing was done for, or that does not say why, is a failure of ours."""
    reasons = {"no room for a checkpoint": "No space left on device", "no room for metrics": "No space left on device",
               "asked to stop": "is saved; the same command continues"}  # fmt: skip
    if status and life.end not in new:
        chaos.wrong.append(f"the run ended with status {status} by itself:\n{output[-6000:]}")
    elif status and life.end in reasons and reasons[life.end] not in output:
        chaos.wrong.append(f"after {life.end!r} nobody said {reasons[life.end]!r}:\n{output[-6000:]}")


def left_behind(run_dir: Path, shared: set[str], *, is_swept_later: bool) -> list[str]:
    """What a run has left shortly after its end; of one that was killed with everything, processes only count."""
    temporary, deadline = _temporary_of(run_dir), time.monotonic() + _GONE_SECONDS
    while True:
        left = [f"process {p}" for p in my_processes() if (variable_of(p, FOLDER) or "").startswith(str(temporary))]
        if not is_swept_later:
            left += [str(path) for path in temporary.glob("engine-*")]
            left += [path for path in _shared_memory() - shared if path.startswith("vllm_dist_")]
        if not left or time.monotonic() > deadline:
            return [f"left behind: {what}" for what in left]
        time.sleep(0.1)


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


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
        steps, workers = f"trainer.steps={args.steps}", f"rollout.tensor_parallel={args.workers}"
        seconds = train(base, calm, steps, workers)
        print(f"undisturbed: {args.steps} steps in {seconds:.0f} s", flush=True)
        started = time.perf_counter()
        kinds = ENGINE if args.workers == 1 else WORKER
        chaos = disturb(base, disturbed, steps, workers, faults=args.faults, seed=args.seed, kinds=kinds)
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
        print("\n".join(wrong) or "every step is there once, and all is equal, bit for bit")
        return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
