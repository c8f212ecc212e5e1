"""One run, one folder: who writes into it now, which configuration it belongs to, and whether it is finished.

``lock.json`` names the machine, job and process that has the folder, and is touched every few seconds while it lives.
An owner is dead if its process is gone (where that can be seen: the same machine and process namespace), or if the file
has not been touched for :data:`STALE_SECONDS` by the clock of the storage itself, so that clocks need not agree.  The
folder of a dead owner is taken over; that of a living one is refused.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from megatron_rest.config import RESOLVED, ConfigError, RestConfig, load, to_dict
from megatron_rest.help_topics import Topic, see
from megatron_rest.processes import space, start_of
from megatron_rest.user_code import recorded

__all__ = [
    "LOCK_FILE",
    "STALE_SECONDS",
    "Owner",
    "claim",
    "finish",
    "hold",
    "is_finished",
    "job_name",
    "other_settings",
    "owner_of",
    "wait_for_owner",
]

LOCK_FILE = "lock.json"
_FINISHED_FILE = "config.yaml"
STALE_SECONDS = 45.0
_BEAT_SECONDS = 10.0
_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who has a run folder."""

    host: str
    pid: int
    started: str
    """Start of the process in clock ticks since boot, so that a number that is used again is not taken for it."""
    space: str
    """Boot and process namespace in which ``pid`` counts."""
    job: str
    """As :func:`job_name`."""
    since: str
    key: str

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=start_of(os.getpid()),
            space=space(),
            job=job_name(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            key=os.urandom(8).hex(),
        )


def job_name() -> str:
    """What names this start of a job alike on all of its machines; empty for a process of its own."""
    if "SLURM_JOB_ID" in os.environ:
        number = os.environ.get("SLURM_HET_JOB_ID", os.environ["SLURM_JOB_ID"])
        return f"slurm {number}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun {os.environ['TORCHELASTIC_RUN_ID']} {os.environ.get('MASTER_PORT', '')}"
    return ""


def owner_of(folder: str | Path) -> Owner | None:
    """Who has ``folder`` and may be alive; answers at once, by this machine's clock."""
    path = Path(folder) / LOCK_FILE
    owner = _read(path)
    with suppress(OSError):
        if owner is not None and _may_live(owner, time.time() - path.stat().st_mtime):
            return owner
    return None


@contextmanager
def hold(folder: str | Path, *, say: Callable[[str], None] = print) -> Iterator[Owner]:
    """Have ``folder`` as long as the block runs.  Raises ConfigError if somebody else has it and lives.

    Waits up to :data:`STALE_SECONDS` to find out whether an owner on another machine lives.  If the folder is taken
    from this process all the same (it was stopped, and taken for dead), the process ends: two must not write there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, me = folder / LOCK_FILE, Owner.here()
    while not _create(path, me):
        _take_from_the_dead(path, say)
    released = threading.Event()
    threading.Thread(target=_beat, args=(path, me, released), name="run folder", daemon=True).start()
    try:
        yield me
    finally:
        released.set()
        if _read(path) == me:
            path.unlink(missing_ok=True)


def wait_for_owner(folder: str | Path, job: str, *, seconds: float) -> bool:
    """Whether this machine sees the first process of ``job`` take ``folder`` within ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            os.listdir(folder)  # network storage remembers what is not there
        owner = _read(Path(folder) / LOCK_FILE)
        if owner is not None and owner.job == job:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)


def claim(config: RestConfig) -> Path:
    """Write ``run.yaml`` into the run folder; ConfigError if its checkpoints belong to another configuration.

    The trainer continues from what it finds, so a changed learning rate would silently join two runs into one.  Longer
    runs, other checkpoint intervals and other layouts are the same run.
    """
    folder = Path(config.trainer.run_dir).absolute()
    path = folder / "run.yaml"
    if path.is_file() and any((folder / "checkpoints").glob("*")):
        try:
            before = load(path)
        except ConfigError:
            before = None
        changed = [] if before is None else [*other_settings(before, config), *_other_code(path, config)]
        if before is None or changed:
            what = f"differs in {', '.join(changed)}" if changed else "cannot be read"
            raise ConfigError(
                f"{folder} holds a run whose run.yaml {what}: choose another trainer.run_dir=, or remove it"
                f"{see(Topic.NO_START)}"
            )
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    if code := recorded(config):
        text += _RECORD + yaml.safe_dump({RESOLVED: {"user_code": code}}, sort_keys=False, allow_unicode=True)
    _write(path, text)
    return path


_RECORD = "\n# What the names and defaults above stood for.  A record: nothing reads it as configuration.\n"


def _other_code(path: Path, config: RestConfig) -> list[str]:
    """Keys of the record in ``path`` that name the same code as ``config``, which is not the same any more."""
    before = yaml.safe_load(path.read_text(encoding="utf-8")).get(RESOLVED) or {}
    old = before.get("user_code") if isinstance(before, dict) else None
    if not isinstance(old, dict):
        return []
    return [
        f"the code of {key} ({now['reference']}: {was} -> {now['package_digest']})"
        for key, now in recorded(config).items()
        if isinstance(old.get(key), dict)
        and old[key].get("reference") == now["reference"]
        and (was := old[key].get("package_digest")) != now["package_digest"]
    ]


def finish(config: RestConfig, resolved: Mapping[str, Any]) -> None:
    """Write ``config.yaml``: what ran, and that it ran to its end.  The last file of a run; whole or not there.

    ``resolved`` is what vLLM and Megatron-Core were made with: their defaults at that version, and what was given.
    """
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    text += _RECORD + yaml.safe_dump({RESOLVED: dict(resolved)}, sort_keys=False, allow_unicode=True)
    _write(Path(config.trainer.run_dir) / _FINISHED_FILE, text)


def is_finished(config: RestConfig) -> bool:
    """Whether the run folder holds the end of a run with exactly this configuration."""
    path = Path(config.trainer.run_dir) / _FINISHED_FILE
    try:
        return load(path) == config and not _other_code(path, config)
    except ConfigError:
        return False


_SAME_RUN = {
    "model.shape",
    "trainer.steps",
    "trainer.timeout_minutes",
    "trainer.save_rollouts_every",
    "trainer.replay_every",
    "trainer.samples_per_step",
    "trainer.loggers",
    "trainer.logger_arguments",
    "reward.workers",
    "reward.call_timeout_seconds",
    "reward.batch_size",
    "reward.retries",
    "optimizer.max_skipped",
    "reward.timeout_seconds",
    "rollout.engine_timeout_seconds",
    "rollout.max_restarts",
    "rollout.replicas",
    "rollout.nodes",
    "rollout.tensor_parallel",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_bytes",
    "rollout.max_concurrent",
    "rollout.sleep_level",
    "parallel",
    "weight_sync",
    "warm_start",
    "validation",
    "checkpoint",
    "profile",
}
"""Sections and fields that may change without making it another run."""


def other_settings(old: RestConfig, new: RestConfig) -> list[str]:
    """Names of the settings in which ``new`` is another run than ``old``."""
    before, after = to_dict(old), to_dict(new)
    return [
        f"{section}.{key}"
        for section, values in after.items()
        for key, value in values.items()
        if before[section][key] != value and not {section, f"{section}.{key}"} & _SAME_RUN
    ]


def _create(path: Path, me: Owner) -> bool:
    """False if somebody has it.  The file appears whole: a link either succeeds or finds another one."""
    partial = path.with_name(f".{path.name}.{me.key}")
    _write(partial, json.dumps(asdict(me), indent=1) + "\n")
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # storage without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(partial.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _take_from_the_dead(path: Path, say: Callable[[str], None]) -> None:
    """Returns when there is no living owner; raises ConfigError if there is one."""
    owner, first_seen = _read(path), _touched(path)
    while owner is not None and _may_live(owner, _age(path)):
        if _touched(path) != first_seen or _is_visible(owner):
            raise ConfigError(
                f"{path.parent} belongs to {owner}: wait for it to end, stop it, or choose another trainer.run_dir"
                f"{see(Topic.NO_START)}"
            )
        time.sleep(_POLL_SECONDS)
        owner = _read(path)
    aside = path.with_name(f".{path.name}.dead.{os.urandom(8).hex()}")
    try:
        path.rename(aside)  # one of several that try succeeds
    except FileNotFoundError:
        return
    if owner is not None and _read(aside) != owner:  # in between somebody else had taken it: put it back
        with suppress(FileExistsError):
            os.link(aside, path)
    elif owner is not None:
        say(f"{path.parent}: taken over from {owner}, which is gone")
    aside.unlink(missing_ok=True)


def _beat(path: Path, me: Owner, released: threading.Event) -> None:
    missed = 0
    while not released.wait(_BEAT_SECONDS):
        found = _read(path)
        if found == me:
            missed = 0
            with suppress(OSError):
                os.utime(path)
            continue
        missed += 1
        if released.is_set() or (found is None and missed < 2):  # storage may be away for a moment
            continue
        print(
            f"error: {path.parent} was taken over by {found or 'somebody who removed its lock'}: this process ends",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)


def _may_live(owner: Owner, age: float) -> bool:
    if owner.space == space():
        return _is_running(owner)
    job, _, restart = owner.job.rpartition(".")
    mine, _, my_restart = job_name().rpartition(".")
    if job and job == mine and restart != my_restart:
        return False  # Slurm starts a job again when nothing of it is left
    return age < STALE_SECONDS


def _is_visible(owner: Owner) -> bool:
    return owner.space == space() and _is_running(owner)


def _is_running(owner: Owner) -> bool:
    return start_of(owner.pid) == owner.started != ""


def _touched(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _age(path: Path) -> float:
    """Seconds since ``path`` was touched, by the clock that stamps files there."""
    probe = path.with_name(f".{path.name}.now.{os.urandom(4).hex()}")
    try:
        probe.touch()
        return _touched(probe) - _touched(path)
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    """None for a file that is gone, or is not a lock (half of one cannot be seen)."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = {"pid": int}
    return owner if all(isinstance(getattr(owner, f.name), kinds.get(f.name, str)) for f in fields(Owner)) else None


def _write(path: Path, text: str) -> None:
    """The whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
