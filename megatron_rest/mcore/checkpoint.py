"""Megatron distributed checkpoints: sharded, layout-free, complete or absent.

A checkpoint is written under ``<folder>/step_000010.partial`` and renamed once every rank has finished; a folder
without that suffix is whole.  Model and optimiser are Megatron's sharded state, so a checkpoint saved at TP2 x PP2
loads at any layout; replicas share the writing.

An asynchronous save takes a snapshot and returns; one forked process a rank writes it while training goes on:

    writer = CheckpointWriter(folder, keep_last=2, is_asynchronous=True)
    writer.save(policy, step=10, extra={...})     # waits for the save before it, if that is still under way
    writer.poll()                                 # after every step: renames what is finished
    writer.wait()                                 # at the end
"""

from __future__ import annotations

import pickle
import queue
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_rest.config import ConfigError
from megatron_rest.mcore.optimizer_state import aligned, is_distributed, load_optimizer_state, prepare_for_loading
from megatron_rest.mcore.policy import MegatronPolicy
from megatron_rest.mcore.safe_loading import check_description, data_only

__all__ = ["CheckpointError", "CheckpointWriter", "latest", "load", "load_model"]

_NAME = re.compile(r"step_(\d{6})$")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written; raised on every rank."""


class CheckpointWriter:
    """Saves of one run into ``folder``.

    Args:
        folder: holds one folder a checkpoint.
        keep_last: older complete checkpoints are removed.
        is_asynchronous: write in the background; at most one save is under way.

    Every method is collective over all ranks and raises :class:`CheckpointError` on all of them if the writing failed
    on one; there is then no such checkpoint.
    """

    def __init__(self, folder: str | Path, *, keep_last: int, is_asynchronous: bool = False) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.folder = Path(folder)
        self.keep_last = keep_last
        self.is_asynchronous = is_asynchronous
        self._calls = AsyncCallsQueue(persistent=False)  # a forked process a save

    def save(self, policy: MegatronPolicy, *, step: int, extra: dict[str, Any]) -> Path:
        """Write ``<folder>/step_<step>`` and return its path, which exists once the checkpoint is whole.

        ``extra`` is plain data (numbers, strings, lists, dicts, tensors) and comes back from :func:`load` as it was.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

        self.wait()
        target = self.folder / f"step_{step:06d}"
        partial_ = target.with_suffix(".partial")
        if policy.context.rank == 0:
            for old in (target, partial_):
                shutil.rmtree(old, ignore_errors=True)
            partial_.mkdir(parents=True)
        dist.barrier()
        _leave_results_in(partial_ / f".written_by_{policy.context.rank}")
        state = _sharded_state(policy, is_loading=False)
        state |= {"step": step, "extra": extra, "optimizer_kind": _optimizer_kind(policy)}
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), policy.context.dp_cp_group)
        with _failures_named(partial_):
            request = dist_checkpointing.save(state, str(partial_), strategy, async_sharded_save=self.is_asynchronous)
        publish = partial(self._publish, partial_, target)
        if request is None:
            publish()
        else:
            request.add_finalize_fn(publish)
            self._calls.schedule_async_request(request)
        return target

    def poll(self) -> None:
        """Complete a save whose processes have all finished; returns at once if one has not."""
        with _failures_named(self.folder):
            self._calls.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Return when nothing is being written."""
        with _failures_named(self.folder):
            self._calls.maybe_finalize_async_calls(blocking=True)

    def _publish(self, written: Path, target: Path) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            written.rename(target)
            for old in _complete(self.folder)[: -self.keep_last]:
                shutil.rmtree(old)
        dist.barrier()


def load(path: str | Path, policy: MegatronPolicy) -> tuple[int, dict[str, Any]]:
    """Fill model and optimiser from a checkpoint of any layout; returns ``(step, extra)``.  Collective.

    Nothing in the folder is executed (``mcore/safe_loading.py``).
    """
    from megatron.core import dist_checkpointing

    _check_whole(path)
    with data_only():
        _check_optimizer(path, policy)
        prepare_for_loading(policy.optimizer)
        state = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(path))
    for i, module in enumerate(policy.modules):
        module.load_state_dict(state[_chunk_key(policy, i)], strict=True)
    load_optimizer_state(policy.optimizer, state["optimizer"])
    policy.scheduler.load_state_dict(state["scheduler"])
    return state["step"], state["extra"]


def load_model(path: str | Path, policy: MegatronPolicy) -> None:
    """Fill the model alone; the policy may have no optimiser, and its layout may be any.  Collective."""
    from megatron.core import dist_checkpointing

    _check_whole(path)
    with data_only():
        state = dist_checkpointing.load(_sharded_model(policy), str(path))
    for i, module in enumerate(policy.modules):
        module.load_state_dict(state[_chunk_key(policy, i)], strict=True)


def _check_whole(path: str | Path) -> None:
    if not (Path(path) / "metadata.json").is_file():
        raise ConfigError(f"checkpoint.load: {path} is not a complete Megatron checkpoint (no metadata.json)")
    check_description(path)


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint under ``folder``."""
    complete = _complete(Path(folder))
    return complete[-1] if complete else None


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if _NAME.match(p.name) and (p / "metadata.json").is_file())


def _chunk_key(policy: MegatronPolicy, i: int) -> str:
    return "model" if len(policy.chunks) == 1 else f"model{i}"


def _metadata(policy: MegatronPolicy) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": policy.context.dp_cp_group,
    }


def _sharded_model(policy: MegatronPolicy) -> dict[str, Any]:
    metadata = _metadata(policy)
    return {
        _chunk_key(policy, i): module.sharded_state_dict(metadata=metadata) for i, module in enumerate(policy.modules)
    }


def _sharded_state(policy: MegatronPolicy, *, is_loading: bool) -> dict[str, Any]:
    metadata, models = _metadata(policy), _sharded_model(policy)
    sharded = models if len(models) > 1 else models["model"]
    with torch.no_grad(), aligned(policy.optimizer):
        optimizer = policy.optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": optimizer, "scheduler": policy.scheduler.state_dict()}


def _optimizer_kind(policy: MegatronPolicy) -> dict[str, bool]:
    """What of the optimiser a checkpoint cannot change when it is loaded."""
    context = policy.context
    has_experts = bool(policy.modules[0].config.num_moe_experts)
    return {
        "is_distributed": is_distributed(policy.optimizer),
        # Experts that are reduced over other ranks than the rest have an optimiser of their own (build.py).
        "has_expert_part": has_experts and (context.ep_size > 1 or context.tp_size > 1),
    }


def _check_optimizer(path: str | Path, policy: MegatronPolicy) -> None:
    from megatron.core.dist_checkpointing import load_common_state_dict

    ours = _optimizer_kind(policy)
    saved = load_common_state_dict(str(path)).get("optimizer_kind", ours)
    if saved["is_distributed"] != ours["is_distributed"]:
        was = str(saved["is_distributed"]).lower()
        raise ConfigError(
            f"checkpoint.load: {path} was saved with parallel.distributed_optimizer={was}, and the two kinds of "
            f"optimiser state cannot be turned into each other: set it to {was}, or start from the run's HF export"
        )
    if saved["has_expert_part"] != ours["has_expert_part"]:
        was = "or tensor_parallel > 1" if saved["has_expert_part"] else "and tensor_parallel = 1"
        least = "> 1" if saved["has_expert_part"] else "= 1"
        raise ConfigError(
            f"checkpoint.load: {path} was saved with parallel.expert_parallel {least} {was}; the optimiser's state of "
            "the experts is arranged differently on the other side of that line: choose such a layout, or start from "
            "the run's HF export"
        )


@contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    """PyTorch's exception is no ``Exception``, and as many tracebacks as there are ranks."""
    try:
        yield
    except CheckpointException as error:
        lines = [f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items())]
        more = f" and {len(lines) - 3} more ranks" if len(lines) > 3 else ""
        raise CheckpointError(f"a checkpoint in {path} could not be written: {'; '.join(lines[:3])}{more}") from error


class _ResultFile:
    """What a writing process tells the trainer, as a file.

    Megatron's own way is a manager process per rank, which outlives a rank that is killed; a pipe of limited size would
    hold the writer up until it is read.  Only this run's own processes write and read the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, value: Any) -> None:
        self.path.write_bytes(pickle.dumps(value))

    def get_nowait(self) -> Any:
        if not self.path.exists():
            raise queue.Empty
        value = pickle.loads(self.path.read_bytes())
        self.path.unlink()
        return value


def _leave_results_in(path: Path) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = _ResultFile(path)
