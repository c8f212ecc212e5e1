"""Run the stages of a recipe on this machine, one after the other, as one NeMo-Run experiment."""

import hashlib
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.compat import ensure_nemo_run_importable
from launch.live import LiveExperiment
from launch.recipe import ROOT, Stage, as_yaml, claim, plan_text, write_atomically
from launch.terminal import Pty
from megatron_rest.code_version import code_version
from megatron_rest.config import RestConfig

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

__all__ = ["command", "run_here", "run_stages", "show_stages"]

_STAMP = ".complete"


def command(stage: Stage, log_dir: Path) -> list[str]:
    """The command line of a stage; ranks above 0 write to files, rank 0 to the terminal."""
    if stage.ranks == 0:
        return [sys.executable, "-m", stage.module, *stage.arguments]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        "--standalone",  # rendezvous on a free port: two runs on a machine do not meet
        *("--nproc-per-node", str(stage.ranks)),
        *("--log-dir", str(log_dir / stage.name)),
        *("--redirects", ",".join(f"{rank}:3" for rank in range(1, stage.ranks)) or "0"),  # 0: of no rank
        *("-m", stage.module, *stage.arguments),
    ]


def run_stages(title: str, stages: Sequence[Stage], executor: run.LocalExecutor, log_dir: Path) -> None:
    """Run what is not complete yet.  A failed stage ends the program with status 1, Ctrl-C with 130."""
    log_dir.mkdir(parents=True, exist_ok=True)
    due = [stage for stage in stages if not _is_complete(stage)]
    for stage in stages:
        if stage not in due:
            print(f"==> {stage.name}: done before ({stage.produces})", flush=True)
    if not due:
        return
    for stage in due:
        _clear(stage)
    terminal = Pty() if sys.stdout.isatty() else None
    reporter = _Reporter({stage.name: stage for stage in due}, log_dir)
    executor.env_vars["REST_CODE"] = code_version(ROOT)
    with LiveExperiment(
        title,
        executor=executor,
        clean_mode=True,
        log_level="WARNING",
        skip_status_at_exit=True,
        enable_goodbye_message=False,
    ) as experiment:
        experiment.log_dir, experiment.on_event, experiment.pty = log_dir, reporter, terminal
        for stage in due:
            experiment.add(_script(stage, log_dir, terminal), name=stage.name)
        experiment.run(sequential=True)


def run_here(
    title: str,
    stages: Sequence[Stage],
    config: RestConfig,
    warm_start: RestConfig,
    *,
    base: Path,
    world_size: int,
    ctx: run.cli.RunContext,
) -> None:
    """One run with its warm start (kept in ``base``) on this machine; a dry run prints all of it."""
    run_dir = Path(config.trainer.run_dir).absolute()
    if ctx.dryrun:
        show_stages(stages, run_dir / "logs")
        print(f"# ----- plan -----\n{plan_text(config, 'cpu', world_size=world_size)}")
        print(f"# ----- {run_dir / 'run.yaml'} -----\n{as_yaml(config)}", end="")
        return
    claim(config)
    write_atomically(base / "warm-start.yaml", as_yaml(warm_start))
    run_stages(title, stages, ctx.executor, run_dir / "logs")


def show_stages(stages: Sequence[Stage], log_dir: Path) -> None:
    """The commands as a shell would take them."""
    for stage in stages:
        print(f"# ----- {stage.name}{' (done before)' if _is_complete(stage) else ''} -----")
        print(shlex.join(command(stage, log_dir)))


def _script(stage: Stage, log_dir: Path, terminal: Pty | None) -> run.Script:
    words = command(stage, log_dir)
    if terminal is not None:
        words = [sys.executable, "-m", "launch.terminal", terminal.name, *words]
    return run.Script(path=words[2], m=True, entrypoint=words[0], args=words[3:])


class _Reporter:
    """Headings between stages, the stamp of a complete one, and where to look after a failure."""

    def __init__(self, stages: dict[str, Stage], log_dir: Path) -> None:
        self._stages = stages
        self._log_dir = log_dir
        self._started = 0.0

    def __call__(self, name: str, event: str) -> None:
        number = list(self._stages).index(name) + 1
        stage = self._stages[name]
        if event == "start":
            self._started = time.monotonic()
            print(f"==> {name} ({number} of {len(self._stages)})", flush=True)
        elif event == "done":
            _stamp(stage)
            print(f"==> {name}: {time.monotonic() - self._started:.0f} s", flush=True)
        else:
            print(f"\n==> {name} failed; its output: {self._log_dir / name}.log", file=sys.stderr, flush=True)
            _show_first_traceback(self._log_dir / name)


def _show_first_traceback(rank_logs: Path) -> None:
    """Ranks above 0 write to files: show the end of the one that failed first, if any did."""
    failed = [path for path in rank_logs.rglob("stderr.log") if "Traceback (most recent call last)" in path.read_text()]
    if failed:
        first = min(failed, key=lambda path: path.stat().st_mtime)
        lines = first.read_text().splitlines()
        print(f"    rank {first.parent.name} ({first}):", *lines[-15:], sep="\n    ", file=sys.stderr, flush=True)


def _fingerprint(stage: Stage) -> str:
    """Changes with the command and with the configuration file it names."""
    digest = hashlib.sha256(shlex.join([stage.module, *stage.arguments, str(stage.ranks)]).encode())
    for argument in stage.arguments:
        if argument.endswith(".yaml") and Path(argument).is_file():
            digest.update(Path(argument).read_bytes())
    return digest.hexdigest()


def _is_complete(stage: Stage) -> bool:
    stamp = stage.produces / _STAMP if stage.produces else None
    return bool(stamp and stamp.is_file() and stamp.read_text() == _fingerprint(stage))


def _stamp(stage: Stage) -> None:
    if stage.produces is not None and stage.produces.is_dir():
        (stage.produces / _STAMP).write_text(_fingerprint(stage))


def _clear(stage: Stage) -> None:
    """Stages write their folder anew; what an interrupted one left is in the way of that."""
    if stage.produces is not None and stage.produces.exists():
        shutil.rmtree(stage.produces)
