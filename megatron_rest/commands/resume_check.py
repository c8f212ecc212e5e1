"""Prove that a run which is killed and started again ends as the run that was not, byte by byte.

Three runs with the same seeds:

  1. without a break        2 K steps
  2. killed                 K steps and their checkpoint, then SIGKILL to every process, in the middle of step K + 1
  3. the same, again        continues from that checkpoint to step 2 K

Compared are the runs' checkpoints of step 2 K (model, optimiser, schedule, every rank's random streams, state of the
curriculum, rollouts waiting in the queue, order of the data, counters, FP8 histories where there are any), every metric
of every step that is no time, the rollouts of every step (what was sampled, with which log-probs, weights, rewards),
and the exported weights.  Checkpoints of step K, too: runs that differ before the kill are not deterministic, and that
says nothing about resuming.

Without --config a tiny model is trained on two CPU ranks, in the hardest mode: one step off (rollouts are in the queue
when the run is killed), token weights that follow measured entropies, asynchronous checkpoints, two updates a step.
With --config it is your run's configuration, on this machine's ranks, in folders of its own: your run is not touched.

  megatron-rest resume-check
  megatron-rest resume-check --config runs/mine/run.yaml --ranks 8 --half 3
  megatron-rest resume-check rollout.max_staleness=0 loss.tis_cap=null parallel.distributed_optimizer=true

Exit status: 0 equal, 1 something differs (named), 2 the runs could not be made, 3 not deterministic before the kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import yaml

from megatron_rest.commands.run_diff import RunDiff, compare_checkpoints, compare_runs
from megatron_rest.commands.tiny import RANKS, make_base, tiny_settings
from megatron_rest.config import ConfigError, RestConfig, load, to_dict, validate
from megatron_rest.mcore.checkpoint_files import SUMS_FILE
from megatron_rest.trainer.console import Console
from megatron_rest.trainer.metrics import METRICS_FILE
from megatron_rest.trainer.starts import STARTS_FILE

__all__ = ["HARDEST", "kill_tree", "main"]

EQUAL, DIFFERENT, FAILED, NOT_DETERMINISTIC = 0, 1, 2, 3
HARDEST = (
    "rollout.max_staleness=1",
    "loss.tis_cap=2.0",
    "loss.kl_coef=0.05",
    "weighting.source=entropy_ema",
    "optimizer.updates_per_step=2",
    "optimizer.decay=linear",
)
# What must have been compared: a part without values would be a check that cannot fail.
_PARTS = ("model", "optimizer", "schedule", "random streams", "curriculum", "data order", "counters", "metrics",
          "rollouts", "exported weights")  # fmt: skip
_POLL_SECONDS = 0.02
_SHOWN = 20  # differences that are printed one by one


class _RunFailedError(RuntimeError):
    """A run did not do what it was started for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run three times, compare; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-rest resume-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML of a run (RUN_DIR/run.yaml); default: the tiny one")
    parser.add_argument("--half", type=int, default=2, metavar="K", help="steps before the kill (%(default)s)")
    parser.add_argument("--ranks", type=int, help="ranks on this machine; default: those the run in --config had, or 2")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the runs and their logs in this new folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    args = parser.parse_args(argv)
    if args.half < 1:
        parser.error(f"--half {args.half}: at least 1")
    if args.keep is not None and args.keep.exists():
        parser.error(f"--keep {args.keep} exists already: name a new folder")
    console = Console()
    try:
        with _folder(args.keep) as folder:
            ranks = args.ranks or _ranks_of(args.config)
            config = _configuration(args.config, args.overrides, folder, half=args.half, ranks=ranks, console=console)
            return _check(config, folder, half=args.half, ranks=ranks, console=console)
    except (ConfigError, _RunFailedError) as error:
        print(f"resume-check: {error}", file=sys.stderr, flush=True)
        return FAILED


def _check(config: RestConfig, folder: Path, *, half: int, ranks: int, console: Console) -> int:
    unbroken, broken = folder / "unbroken", folder / "killed"
    _run(config, unbroken, "1/3 without a break", steps=2 * half, ranks=ranks, console=console)
    _run(config, broken, "2/3 to be killed", steps=2 * half, ranks=ranks, console=console, kill_after=half)
    before = compare_checkpoints(*(run / "checkpoints" / f"step_{half:06d}" for run in (unbroken, broken)))
    if before.differences:
        console.line(f"the runs differ at step {half}, before the kill: this configuration is not deterministic")
        _show(before, console)
        return NOT_DETERMINISTIC
    _run(config, broken, "3/3 started again", steps=2 * half, ranks=ranks, console=console)
    starts = [json.loads(line)["after_step"] for line in (broken / STARTS_FILE).read_text().splitlines()]
    if starts != [0, half]:
        raise _RunFailedError(f"the killed run started after steps {starts}, expected [0, {half}]")
    diff = compare_runs(unbroken, broken, step=2 * half)
    missing = [part for part in _PARTS if not diff.compared[part]]
    if config.rollout.max_staleness and half > 0:
        missing += _without_queue(broken, half)
    if missing:
        raise _RunFailedError(f"nothing of {', '.join(missing)} was found to compare")
    _show(diff, console)
    return DIFFERENT if diff.differences else EQUAL


def _without_queue(run_dir: Path, half: int) -> list[str]:
    """The queue is empty after the last step; that it was not when the run was killed is seen in that checkpoint."""
    path = run_dir / "checkpoints" / f"step_{half:06d}"
    return [] if compare_checkpoints(path, path).compared["rollout queue"] > 1 else ["rollout queue"]


def _show(diff: RunDiff, console: Console) -> None:
    unequal = {part: sum(d.part == part for d in diff.differences) for part in (d.part for d in diff.differences)}
    for part in sorted({*diff.compared, *unequal}):
        verdict = f"{unequal[part]} DIFFER" if part in unequal else "equal"
        console.line(f"  {part:18s} {diff.compared[part]:6d} values  {verdict}")
    for found in diff.differences[:_SHOWN]:
        console.line(f"  {found}")
    if len(diff.differences) > _SHOWN:
        console.line(f"  and {len(diff.differences) - _SHOWN} more")
    console.line("DIFFERENT" if diff.differences else "equal, byte by byte")


def _configuration(
    path: Path | None, overrides: list[str], folder: Path, *, half: int, ranks: int, console: Console
) -> RestConfig:
    settings = list(overrides)
    if path is None:
        console.line("making a tiny model and its data")
        settings = [*tiny_settings(make_base(folder)), *HARDEST, *settings]
    settings += [
        f"trainer.steps={2 * half}",
        "trainer.save_rollouts_every=1",
        f"checkpoint.save_every={half}",
        "checkpoint.keep_last=2",
        "checkpoint.keep_best=0",
        "checkpoint.export_hf=true",
    ]
    if path is None:
        settings.append("checkpoint.asynchronous=true")
    config = load(path, settings)
    validate(config, world_size=ranks)
    return config


def _ranks_of(path: Path | None) -> int:
    """As many as the run had that this configuration lies beside."""
    if path is None:
        return RANKS
    starts = path.with_name(STARTS_FILE)
    if not starts.is_file():
        raise ConfigError(f"{path} does not lie beside a {STARTS_FILE} that says how many ranks it ran on: say --ranks")
    return int(json.loads(starts.read_text().splitlines()[-1])["world_size"])


def _run(
    config: RestConfig,
    run_dir: Path,
    title: str,
    *,
    steps: int,
    ranks: int,
    console: Console,
    kill_after: int | None = None,
) -> None:
    """One run under torchrun; ``kill_after`` ends it with SIGKILL once that step's checkpoint is whole."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "run.yaml"
    values = to_dict(config)
    values["trainer"]["run_dir"] = str(run_dir)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "megatron_rest.trainer", "--config", str(path)]  # fmt: skip
    log = run_dir / f"{title[0]}.log"
    awaited = run_dir / "checkpoints" / f"step_{kill_after or 0:06d}" / SUMS_FILE
    done = before = _num_steps(run_dir)
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
        console.progress(title, total=steps - before, unit="step") as progress,
    ):
        try:
            while process.poll() is None and not (kill_after and awaited.is_file()):
                progress.update(max(_num_steps(run_dir) - done, 0))
                done = max(done, _num_steps(run_dir))
                time.sleep(_POLL_SECONDS)
        finally:
            status = process.poll()
            kill_tree(process)
        progress.update(max(_num_steps(run_dir) - done, 0))
    if kill_after and status is not None:
        raise _RunFailedError(f"{title}: ended with status {status} before it could be killed:\n{_end_of(log)}")
    if not kill_after and status != 0:
        raise _RunFailedError(f"{title}: ended with status {status}:\n{_end_of(log)}")


class _Process(Protocol):
    pid: int

    def wait(self) -> object: ...


def kill_tree(process: _Process) -> None:
    """SIGKILL to ``process`` and everything below it, all at once as far as that goes; nothing of it is left."""
    try:
        tree = [psutil.Process(process.pid)]
        tree += tree[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for victim in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    psutil.wait_procs(tree, timeout=30)


def _num_steps(run_dir: Path) -> int:
    path = run_dir / METRICS_FILE
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _end_of(log: Path, num_lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="resume-check-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
