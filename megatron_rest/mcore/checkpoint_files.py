"""A folder of checkpoints as files: which are whole, which are damaged, which to keep.  No torch, no ranks.

<folder>/step_000010            whole when it got its name
    sha256sums                  of every other file; `sha256sum -c sha256sums` reads it, too
    step.json                   {"step": 10, "metrics": {...}}: what the run measured when it was saved
<folder>/step_000012.partial    being written, or left by a run that was killed while it wrote
<folder>/step_000008.damaged    was whole, is not any more; kept for people, never loaded
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = [
    "SUMMARY_FILE",
    "SUMS_FILE",
    "complete",
    "damage",
    "file_sum",
    "files_of",
    "is_measured",
    "latest",
    "superfluous",
    "sync_folder",
    "write_summary",
    "write_sums",
]

SUMS_FILE = "sha256sums"
SUMMARY_FILE = "step.json"
_NAME = re.compile(r"step_(\d{6,})$")
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def complete(folder: str | Path) -> list[Path]:
    """Checkpoints that were whole when they were written, oldest first."""
    found = [(int(match[1]), p) for p in Path(folder).glob("step_*") if (match := _NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found) if (path / SUMS_FILE).is_file()]


def latest(folder: str | Path) -> Path | None:
    """The newest of :func:`complete`."""
    paths = complete(folder)
    return paths[-1] if paths else None


def files_of(path: Path) -> list[str]:
    """Names of what a checkpoint consists of, the list of sums left out."""
    return sorted(p.name for p in path.iterdir() if p.name != SUMS_FILE and p.is_file())


def file_sum(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(path: Path, sums: Mapping[str, str]) -> None:
    """The list that :func:`damage` compares with, on disk when this returns."""
    _write_durably(path / SUMS_FILE, "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))


def write_summary(path: Path, step: int, metrics: Mapping[str, float]) -> None:
    """``step.json``; numbers that are not finite are left out."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    _write_durably(path / SUMMARY_FILE, json.dumps({"step": step, "metrics": finite}, indent=1) + "\n")


def damage(path: Path, *, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with every ``num_parts``-th file of a checkpoint; empty if nothing is.

    ``part`` 0, 1, ...: ranks share the reading.
    """
    try:
        text = (path / SUMS_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS_FILE} cannot be read ({error})"]
    lines = text.splitlines()
    entries = [match.groups() for match in map(_LINE.fullmatch, lines) if match]
    if not entries or len(entries) != len(lines) or not text.endswith("\n"):
        return [f"{SUMS_FILE} is not a list of sums"]
    found = []
    for expected, name in entries[part::num_parts]:
        try:
            if file_sum(path / name) != expected:
                found.append(f"{name} is not what was written (sha256 differs)")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def superfluous(folder: str | Path, *, keep_last: int, keep_best: int, best_metric: str) -> list[Path]:
    """Checkpoints that may go: neither among the last ``keep_last`` nor among the best ``keep_best``.

    ``best_metric`` names a metric of the step; larger is better, with a leading "-" smaller is.  Of equals the newer
    is kept.  A checkpoint whose step did not measure it is not among the best.
    """
    paths = complete(folder)
    name, sign = best_metric.removeprefix("-"), -1.0 if best_metric.startswith("-") else 1.0
    scored = [(sign * score, i) for i, path in enumerate(paths) if (score := _measured(path).get(name)) is not None]
    best = {i for _, i in sorted(scored)[-keep_best:]} if keep_best else set()
    return [path for i, path in enumerate(paths[:-keep_last]) if i not in best]


def is_measured(metric: str, metrics: Iterable[str]) -> bool:
    """Whether ``best_metric`` is one of ``metrics``."""
    return metric.removeprefix("-") in metrics


def sync_folder(path: Path) -> None:
    """A rename inside ``path`` survives a power cut once this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measured(path: Path) -> dict[str, float]:
    try:
        metrics = json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))["metrics"]
        return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
