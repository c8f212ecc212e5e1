"""Train for many steps and watch every process of the run: memory, file descriptors, threads, shared memory.

    python -m benchmarks.long_run [--steps 200] [--ranks 2] [--replicas 1] [--json FILE] [--keep FOLDER]

A tiny model in short steps (two prompts, four rollouts of at most 32 tokens), TP over the ranks, an engine in a process
of its own, a checkpoint in the background every 20 steps.  Every two seconds each process of the tree is looked at.
What is judged is the second half of the run, after caches and allocators have seen everything:

    heap                  bytes handed out by the allocator and not given back, and Python's own blocks, a step: a line
                          through what each process says of itself (heap_probe/sitecustomize.py), as the median of
                          all slopes (Theil-Sen)
    resident memory       the same line, with a wider limit: holes in the heap and first uses of pages move it, too
    descriptors, threads  in the last quarter of the run against the quarter before it, medians: what is open for a
                          moment, or closed while the process ends, is none
    shared memory         the same, of files in /dev/shm that a process of the run maps
    left behind           processes of the run, and such files, five seconds after its end

oneDNN, with which PyTorch multiplies on CPU, keeps a compiled kernel for each shape it has met, 1024 by default.  That
cache would hide a leak for hundreds of steps, so the run gets a small one (ONEDNN_PRIMITIVE_CACHE_CAPACITY=16, if not
set otherwise).  Exit status 1 if something grows or is left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos import ROOT, make_base

__all__ = ["Sample", "Watch", "growth", "train_command"]

_PERIOD_SECONDS = 2.0
_SHM = "/dev/shm/"
_PROBE = ROOT / "benchmarks" / "heap_probe"
_MOST_A_STEP = {"heap_bytes": 4_000, "python_blocks": 40, "rss_bytes": 50_000}  # a leaked rollout has more than these
_GONE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment."""

    role: str
    pid: int
    step: int
    rss_bytes: int
    heap_bytes: int | None  # by the probe; None before its first report
    python_blocks: int | None
    num_fds: int
    num_threads: int
    num_shm: int


@dataclass
class Watch:
    """All processes below one, while they live."""

    root: psutil.Process
    probe: Path | None = None  # HEAP_PROBE_FOLDER of the run
    samples: list[Sample] = field(default_factory=list)
    seen: dict[int, float] = field(
        default_factory=dict
    )  # pid -> when it was made, so that a reused number is none of ours
    shm: set[str] = field(default_factory=set)  # every file in /dev/shm that one of them has mapped
    listening: set[tuple[str, str]] = field(default_factory=set)  # (role, address)

    def look(self, step: int) -> None:
        """One sample of every process that is there."""
        for process in [self.root, *_children(self.root)]:
            try:
                with process.oneshot():
                    role, maps = _role(process), _shm_maps(process.pid)
                    self.seen[process.pid] = process.create_time()
                    self.shm |= maps
                    memory, fds, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
                    heap = self._heap(process.pid)
                    self.samples.append(Sample(role, process.pid, step, memory, *heap, fds, threads, len(maps)))
                for connection in process.net_connections(kind="inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        self.listening.add((role, str(connection.laddr.ip)))
            except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                continue

    def _heap(self, pid: int) -> tuple[int | None, int | None]:
        if self.probe is None or not (path := self.probe / str(pid)).exists():
            return None, None
        heap, blocks = map(int, path.read_text().split())
        return heap, blocks

    def left_behind(self, seconds: float = _GONE_SECONDS) -> list[str]:
        """Processes and shared memory of the run that are there ``seconds`` after its end at the latest."""
        deadline = time.monotonic() + seconds
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _left(self) -> list[str]:
        left = [f"file {path}" for path in sorted(self.shm) if Path(path).exists()]
        for pid, made in self.seen.items():
            try:
                process = psutil.Process(pid)
                if process.create_time() == made and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(f"process {pid}: {' '.join(process.cmdline()[:6])}")
            except psutil.NoSuchProcess:
                continue
        return left


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _role(process: psutil.Process) -> str:
    command = process.cmdline()
    if "megatron_rest.rollout.worker" in command:
        return "engine"
    if any("torch.distributed.run" in word for word in command):
        return "torchrun"
    if "megatron_rest.trainer" in command:
        rank = process.environ().get("RANK", "?")
        parent = process.parent()
        is_writer = parent is not None and "torch.distributed.run" not in " ".join(parent.cmdline())
        return f"writer of rank {rank}" if is_writer else f"rank {rank}"
    return "helper"


def _shm_maps(pid: int) -> set[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line[line.index(_SHM) :] for line in lines if _SHM in line and not line.endswith("(deleted)")}


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Theil-Sen: the median of the slopes between all pairs; a few odd samples do not move it."""
    ordered = list(points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(ordered) for b in ordered[i + 1 :] if b[0] != a[0]]
    return statistics.median(slopes) if slopes else 0.0


def growth(samples: Iterable[Sample], steps: int) -> dict[str, dict[str, float]]:
    """By role of those that live through the second half: what grew in it."""
    by_role: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.step >= steps // 2:
            by_role[sample.role].append(sample)
    table = {}
    for role, mine in sorted(by_role.items()):
        if role.startswith("writer") or role == "helper" or len({s.pid for s in mine}) > 1 or len(mine) < 4:
            continue  # lives for a moment
        early = [s for s in mine if s.step < steps * 3 // 4] or mine
        late = [s for s in mine if s.step >= steps * 3 // 4] or mine
        row = {"rss_mb": statistics.median(s.rss_bytes for s in late) / 1e6}
        for name in _MOST_A_STEP:
            row[f"{name}_a_step"] = slope((s.step, v) for s in mine if (v := getattr(s, name)) is not None)
        for name in ("num_fds", "num_threads", "num_shm"):
            before, after = (statistics.median(getattr(s, name) for s in part) for part in (early, late))
            row[name], row[f"{name}_grown"] = float(after), float(after - before)
        table[role] = row
    return table


def verdicts(table: dict[str, dict[str, float]]) -> list[str]:
    """What grew too much."""
    found = []
    for role, row in table.items():
        found += [
            f"{role}: {name.replace('_', ' ')} grow by {row[f'{name}_a_step']:.0f} a step, limit {most}"
            for name, most in _MOST_A_STEP.items()
            if row[f"{name}_a_step"] > most
        ]
        found += [
            f"{role}: {row[name]:+g} {name.removeprefix('num_').removesuffix('_grown')} in the last quarter"
            for name in ("num_fds_grown", "num_threads_grown", "num_shm_grown")
            if row[name] > 0
        ]
    return found


def train_command(base: Path, run_dir: Path, *overrides: str, ranks: int, replicas: int) -> list[str]:
    """torchrun with short steps of a tiny model."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "megatron_rest.trainer",
        f"model.path={base / 'model'}",
        f"data.train={base / 'train'}",
        f"trainer.run_dir={run_dir}",
        "model.max_sequence_length=352",
        "data.max_prompt_tokens=256",
        "data.prompts_per_step=2",
        f"rollout.replicas={replicas}",
        "rollout.rollouts_per_prompt=2",
        "rollout.max_response_tokens=32",
        f"weight_sync.transport={'gloo' if replicas else 'local'}",
        f"parallel.tensor_parallel={ranks}",
        "optimizer.lr=1e-3",
        "loss.entropy_coef=0.01",  # gradients also where all siblings of a group fail alike
        "trainer.max_tokens_per_microbatch=512",
        "trainer.timeout_minutes=5",
        "checkpoint.asynchronous=true",
        "checkpoint.keep_last=2",
        "checkpoint.save_every=20",
        *overrides,
    ]  # fmt: skip


def probe_environment(folder: Path) -> dict[str, str]:
    """Environment of a process that shall say, with all below it, what its heap holds."""
    paths = [str(_PROBE), *filter(None, [os.environ.get("PYTHONPATH")])]
    cache = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
    return cache | os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HEAP_PROBE_FOLDER": str(folder)}


def watch(command: list[str], run_dir: Path, steps: int) -> tuple[Watch, int]:
    """Run it to its end under watch; what was seen, and its exit status."""
    metrics = run_dir / "metrics.jsonl"
    with (
        tempfile.TemporaryDirectory() as probe,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=probe_environment(Path(probe))) as process,
    ):
        seen = Watch(psutil.Process(process.pid), Path(probe))
        while process.poll() is None:
            step = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            seen.look(step)
            print(f"\rstep {step} of {steps}", end="", file=sys.stderr, flush=True)
            time.sleep(_PERIOD_SECONDS)
    print(file=sys.stderr)
    return seen, process.returncode


def main() -> int:
    """0: nothing grew, nothing is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=200, help="with fewer, caches still fill while it is judged (%(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="tensor-parallel training ranks (%(default)s)")
    parser.add_argument("--replicas", type=int, default=1, help="engines; 0: one in every rank's process (%(default)s)")
    parser.add_argument("--json", type=Path, help="write table and samples there")
    parser.add_argument("--keep", type=Path, help="keep the run in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(args.keep or Path(scratch))
        run_dir = base / "long-run"
        command = train_command(base, run_dir, f"trainer.steps={args.steps}", ranks=args.ranks, replicas=args.replicas)
        started = time.monotonic()
        seen, status = watch(command, run_dir, args.steps)
        seconds = time.monotonic() - started
        left = seen.left_behind()
    table = growth(seen.samples, args.steps)
    found = [*verdicts(table), *left, *([f"exit status {status}"] if status else [])]
    if not table:
        found.append("too few samples: more steps")
    if all(sample.heap_bytes is None for sample in seen.samples):
        found.append("no process told of its heap: that needs glibc 2.33")
    _show(table, args.steps, seconds, seen)
    print("\n".join(found) if found else "nothing grows, nothing is left behind")
    if args.json:
        values: dict[str, Any] = {"steps": args.steps, "seconds": seconds, "table": table, "found": found}
        args.json.write_text(json.dumps(values | {"samples": [asdict(s) for s in seen.samples]}))
    return int(bool(found))


def _show(table: dict[str, dict[str, float]], steps: int, seconds: float, seen: Watch) -> None:
    print(f"{steps} steps in {seconds:.0f} s; second half of the run:")
    columns = [*(f"{name.replace('_', ' ')}/step" for name in _MOST_A_STEP), "fds", "threads", "/dev/shm"]
    print(f"{'process':12s} {'RSS MB':>8s} " + " ".join(f"{c:>18s}" for c in columns))
    for role, row in table.items():
        slopes = [f"{row[f'{name}_a_step']:.0f}" for name in _MOST_A_STEP]
        counts = [f"{row[n]:g} ({row[n + '_grown']:+g})" for n in ("num_fds", "num_threads", "num_shm")]
        print(f"{role:12s} {row['rss_mb']:8.0f} " + " ".join(f"{c:>18s}" for c in [*slopes, *counts]))
    for role, address in sorted(seen.listening):
        print(f"{role} listens on {address}")


if __name__ == "__main__":
    sys.exit(main())
