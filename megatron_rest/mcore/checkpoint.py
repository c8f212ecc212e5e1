"""Megatron distributed checkpoints: sharded, layout-free, complete or absent.

A checkpoint is written under ``<folder>/step_000010.partial`` and renamed once every rank has finished; a folder
without that suffix is whole.  Model and optimiser are Megatron's sharded state, so a checkpoint saved at TP2 x PP2
loads at any layout.
"""

from __future__ import annotations

import queue
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rest.config import ConfigError
from megatron_rest.mcore.build import ParallelContext
from megatron_rest.mcore.policy import MegatronPolicy

__all__ = ["latest", "load", "save"]

_NAME = re.compile(r"step_(\d{6})$")


def save(folder: str | Path, policy: MegatronPolicy, *, step: int, extra: dict[str, Any], keep_last: int) -> Path:
    """Write ``<folder>/step_<step>``; collective over all ranks; returns when the checkpoint is whole on disk.

    ``extra`` is plain data (numbers, strings, lists, dicts, tensors) and comes back from :func:`load` as it was.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # A synchronous save hands its results over inside this process.  Megatron's default is a manager process per rank,
    # which a killed rank leaves behind.
    filesystem_async._results_queue = queue.Queue()
    target = Path(folder) / f"step_{step:06d}"
    partial = target.with_suffix(".partial")
    if policy.context.rank == 0:
        for old in (target, partial):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(policy, is_loading=False)
    state |= {"step": step, "extra": extra}
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if policy.context.rank == 0:
        partial.rename(target)
        for old in _complete(Path(folder))[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def load(path: str | Path, policy: MegatronPolicy) -> tuple[int, dict[str, Any]]:
    """Fill model and optimiser from a checkpoint of any layout; returns ``(step, extra)``.  Collective."""
    from megatron.core import dist_checkpointing

    if not (Path(path) / "metadata.json").is_file():
        raise ConfigError(f"checkpoint.load: {path} is not a complete Megatron checkpoint (no metadata.json)")
    state = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(path))
    for i, module in enumerate(policy.modules):
        module.load_state_dict(state[_chunk_key(policy, i)], strict=True)
    policy.optimizer.load_state_dict(state["optimizer"])
    policy.scheduler.load_state_dict(state["scheduler"])
    return state["step"], state["extra"]


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint under ``folder``."""
    complete = _complete(Path(folder))
    return complete[-1] if complete else None


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if _NAME.match(p.name) and (p / "metadata.json").is_file())


def _chunk_key(policy: MegatronPolicy, i: int) -> str:
    return "model" if len(policy.chunks) == 1 else f"model{i}"


def _sharded_state(policy: MegatronPolicy, *, is_loading: bool) -> dict[str, Any]:
    context: ParallelContext = policy.context
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": context.pg_collection.dp_cp,
    }
    models = {
        _chunk_key(policy, i): module.sharded_state_dict(metadata=metadata) for i, module in enumerate(policy.modules)
    }
    sharded = models if len(models) > 1 else models["model"]
    with torch.no_grad():
        optimizer = policy.optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": optimizer, "scheduler": policy.scheduler.state_dict()}
