"""Two runs that should be the same run: everything they left behind, byte by byte, times aside.

report = compare_runs(first, second, step=4)
report.compared      {"model": 31, "optimizer": 96, ...}: how many values of each part
report.differences   [Difference(part="optimizer", name="...", what="17 of 4096 values, at most 3e-08")]
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_rest.data.rollout_file import read_rollouts, rollout_files
from megatron_rest.mcore.checkpoint import late_tensors
from megatron_rest.trainer.metrics import METRICS_FILE

__all__ = ["Difference", "RunDiff", "checkpoint_values", "compare_checkpoints", "compare_runs"]

# What the trainer's own part of a checkpoint is, for people.
_EXTRA_PARTS = {"weighting": "curriculum", "queue": "rollout queue", "next_prompts": "data order"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that differs."""

    part: str
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.part}: {self.name}: {self.what}"


@dataclass(slots=True)
class RunDiff:
    """What was compared, and what differs."""

    compared: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)

    def take(self, part: str, name: str, first: Any, second: Any) -> None:
        """Compare one value of each run."""
        self.compared[part] += 1
        what = difference(first, second)
        if what:
            self.differences.append(Difference(part, name, what))

    def merge(self, other: RunDiff) -> None:
        self.compared += other.compared
        self.differences += other.differences


def compare_runs(first: Path, second: Path, *, step: int, but: frozenset[str] = frozenset()) -> RunDiff:
    """Checkpoint of ``step``, metrics of all steps, saved rollouts and the HF export of two run folders.

    ``but``: metrics that may differ.
    """
    diff = RunDiff()
    diff.merge(compare_checkpoints(_checkpoint(first, step), _checkpoint(second, step), but=but))
    diff.merge(_compare_named("metrics", dict(_metrics(first, but)), dict(_metrics(second, but))))
    diff.merge(_compare_named("rollouts", dict(_rollouts(first)), dict(_rollouts(second))))
    diff.merge(_compare_named("exported weights", dict(_export(first)), dict(_export(second))))
    return diff


def compare_checkpoints(first: Path, second: Path, *, but: frozenset[str] = frozenset()) -> RunDiff:
    """Everything in two checkpoint folders of the same layout."""
    ours, theirs = (
        {
            key: value
            for key, value in checkpoint_values(path).items()
            if not ("rollout/restarts" in but and _is_restarts(key))
        }
        for path in (first, second)
    )
    diff = RunDiff()
    for part in sorted({part for part, _ in (*ours, *theirs)}):
        a, b = ({name: value for (p, name), value in values.items() if p == part} for values in (ours, theirs))
        diff.merge(_compare_named(part, a, b))
    return diff


def checkpoint_values(path: Path) -> dict[tuple[str, str], Any]:
    """``(part, name) -> value`` of a checkpoint: tensors as they are saved, everything else as plain values."""
    planner = _RawObjects()
    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
    values: dict[tuple[str, str], Any] = {}
    for key, value in state.items():
        part = _part_of(key)
        if isinstance(value, io.BytesIO):
            value.seek(0)
            stored = torch.load(value, weights_only=True)
            if part == "fp8 histories" and _is_empty(stored):
                part = "model"  # a module that could have histories and has none
            values |= {(part, name): leaf for name, leaf in _leaves(key, stored)}
        else:
            values[part, key] = value
    common = torch.load(path / "common.pt", weights_only=True)
    for section, value in common.items():
        if section == "extra":
            for name, content in value.items():
                part = _EXTRA_PARTS.get(name, "counters")
                values |= {(part, leaf_name): leaf for leaf_name, leaf in _leaves(name, content)}
        else:
            part = {"scheduler": "schedule", "optimizer": "optimizer"}.get(section, "counters")
            values |= {(part, leaf_name): leaf for leaf_name, leaf in _leaves(section, value)}
    for name, tensor in late_tensors(path).items():
        part = _EXTRA_PARTS.get(name.partition(".")[0], "counters")
        values[part, name] = tensor
    return values


def difference(first: Any, second: Any) -> str:
    """How two values differ; empty if they are the same, bit for bit."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        first, second = torch.from_numpy(np.ascontiguousarray(first)), torch.from_numpy(np.ascontiguousarray(second))
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return f"{first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
        if torch.equal(*as_bytes):
            return ""
        unequal = (as_bytes[0] != as_bytes[1]).reshape(first.numel(), -1).any(1)
        gap = (first.double() - second.double()).abs().max()
        return f"{int(unequal.sum())} of {first.numel()} values, by {float(gap):.3g} at most"
    if type(first) is type(second) and (first == second or (first != first and second != second)):
        return ""
    return f"{_short(first)} and {_short(second)}"


class _RawObjects(_EmptyStateDictLoadPlanner):
    """Reads everything; what is no tensor stays bytes, so that nothing is unpickled here."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = io.BytesIO(value.getvalue())


def _checkpoint(run_dir: Path, step: int) -> Path:
    path = run_dir / "checkpoints" / f"step_{step:06d}"
    if not path.is_dir():
        raise FileNotFoundError(f"{run_dir} has no checkpoint of step {step}")
    return path


def _part_of(key: str) -> str:
    if key.startswith("optimizer."):
        return "optimizer"
    if key.startswith("rng/"):
        return "random streams"
    return "fp8 histories" if "_extra_state" in key else "model"


def _is_empty(stored: Any) -> bool:
    if isinstance(stored, list):
        return all(map(_is_empty, stored))
    return stored is None or (isinstance(stored, torch.Tensor) and stored.numel() == 0)


def _is_restarts(key: tuple[str, str]) -> bool:
    return key == ("counters", "num_restarts")


def _compare_named(part: str, first: dict[str, Any], second: dict[str, Any]) -> RunDiff:
    diff = RunDiff()
    for name in sorted(first.keys() | second.keys()):
        if name in first and name in second:
            diff.take(part, name, first[name], second[name])
        else:
            only = "first" if name in first else "second"
            diff.differences.append(Difference(part, name, f"only in the {only} run"))
    return diff


def _metrics(run_dir: Path, but: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Every number of every step but times.  A step that is there twice is told by its second line."""
    seen: Counter[int] = Counter()
    for line in (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seen[row["step"]] += 1
        times = "" if seen[row["step"]] == 1 else f" (line {seen[row['step']]} of this step)"
        yield f"policy_version of step {row['step']}{times}", row["policy_version"]
        for name, value in row["metrics"].items():
            if name not in but and not name.endswith("seconds"):
                yield f"{name} of step {row['step']}{times}", value


def _rollouts(run_dir: Path) -> Iterator[tuple[str, Any]]:
    for step, path in rollout_files(run_dir):
        saved = read_rollouts(path)
        for name in saved.__dataclass_fields__:
            yield f"{name} of step {step}", getattr(saved, name)


def _export(run_dir: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted((run_dir / "hf").glob("*.safetensors")):
        yield from load_file(path).items()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(f"{name}.{i}", inner)
    else:
        yield name, value


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
