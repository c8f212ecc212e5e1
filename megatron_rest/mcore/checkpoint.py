"""Megatron distributed checkpoints: sharded, layout-free, complete or absent, and what was written or refused.

A checkpoint is written under ``<folder>/step_000010.partial`` and renamed once every rank has finished and the sums of
all files are on disk; a folder without that suffix is whole.  Before one is loaded every file is compared with its sum.
Model and optimiser are Megatron's sharded state, and replicas share the writing.  A checkpoint saved at TP2 x PP2 loads
at any layout, except for the distributed optimiser's state, which is written in one of two forms:

    any layout     every rank gathers its replicas' state in host memory, 12 bytes a parameter of its shard and as much
                   again on the way
    as it lies     every rank writes what it holds, from where it lies: nothing is gathered.  It loads at another number
                   of replicas, and not at another TP, PP, VPP or EP (`megatron-rest reshard` writes the other form)

An asynchronous save takes a snapshot and returns; one forked process a rank writes it while training goes on:

    writer = CheckpointWriter(folder, config.checkpoint)
    writer.save(policy, step=10, extra={...})     # waits for the save before it, if that is still under way
    writer.poll()                                 # after every step: renames what is finished
    writer.complete({...})                        # what was not there yet when save() took its snapshot
    writer.wait()                                 # at the end

    path, notes = newest_intact(folder)           # None if there is none; notes say what is damaged
    loaded = load(path, policy)
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import pickle
import queue
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException

from megatron_rest.config import CheckpointConfig, ConfigError, RestConfig
from megatron_rest.errors import RunError
from megatron_rest.help_topics import Topic, see
from megatron_rest.mcore import checkpoint_files as files
from megatron_rest.mcore import rng
from megatron_rest.mcore.checkpoint_files import latest
from megatron_rest.mcore.optimizer_state import (
    aligned,
    clear_padding,
    is_distributed,
    load_optimizer_state,
    prepare_for_loading,
)
from megatron_rest.mcore.policy import MegatronPolicy
from megatron_rest.mcore.safe_loading import check_description, data_only

__all__ = [
    "ANY_LAYOUT",
    "AS_IT_LIES",
    "CheckpointError",
    "CheckpointWriter",
    "Loaded",
    "late_tensors",
    "latest",
    "load",
    "load_model",
    "named_or_latest",
    "newest_intact",
]

_log = logging.getLogger(__name__)

_SUMS_OF_RANK = ".sums_of_{}"
_LATE_FILE = "late.safetensors"
_RESULT_OF_RANK = ".written_by_{}"
ANY_LAYOUT, AS_IT_LIES = "fully_reshardable", "dp_reshardable"  # Megatron's names
_SETTINGS = ("max_lr", "min_lr", "betas", "eps")  # of a parameter group; the scheduler sets lr and weight_decay


class CheckpointError(RunError):
    """A checkpoint that could not be written, or of which none is intact; raised on every rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a checkpoint says besides model, optimiser and schedule, which are filled in."""

    step: int
    extra: dict[str, Any]  # as it was given to save()
    rng: dict[str, Any] | None
    """This rank's random streams (``mcore.rng.restore``); None if the checkpoint was saved at another layout, where no
    rank is the same."""


class CheckpointWriter:
    """Saves of one run into ``folder``; ``config`` says how many are kept and whether training waits.

    Every method is collective over all ranks and raises :class:`CheckpointError` on all of them if the writing failed
    on one; there is then no such checkpoint, and those before it are untouched.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.folder = Path(folder)
        self.config = config
        self._calls = AsyncCallsQueue(persistent=False)  # a forked process a save
        self._late: _Late | None = None

    def check_writable(self) -> None:
        """Find out now, and not when the first checkpoint is due, that nothing can be written into the folder."""
        _on_rank_0(self._probe, self.folder)

    def _probe(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.write(b"writable")

    @property
    def is_waiting(self) -> bool:
        """Whether a save waits for :meth:`complete`."""
        return self._late is not None and not self._late.is_there

    def save(
        self,
        policy: MegatronPolicy,
        *,
        step: int,
        extra: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
        is_complete: bool = True,
        form: str = ANY_LAYOUT,
    ) -> Path:
        """Write ``<folder>/step_<step>`` and return its path, which exists once the checkpoint is whole.

        ``extra`` is plain data (numbers, strings, lists, dicts, tensors) and comes back from :func:`load` as it was;
        only rank 0's is written.  ``metrics`` of the step go into ``step.json``; ``checkpoint.best_metric`` is one of
        them.  ``form`` of the distributed optimiser's state: ``ANY_LAYOUT`` or ``AS_IT_LIES`` (above).  Without
        ``is_complete`` the checkpoint is not whole before :meth:`complete` has brought the rest.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

        self.wait()
        assert self._late is None, "the save before this one was never completed"
        target = self.folder / f"step_{step:06d}"
        partial_ = target.with_suffix(".partial")
        _on_rank_0(partial(_make_room, target, partial_), partial_)
        _leave_results_in(partial_ / _RESULT_OF_RANK.format(policy.context.rank))
        form = form if is_distributed(policy.optimizer) else ANY_LAYOUT
        state = _sharded_state(policy, is_loading=False, form=form)
        state |= {"step": step, "extra": extra, "optimizer_kind": _optimizer_kind(policy), "layout": _layout(policy)}
        state["optimizer_form"] = form
        state["rng"] = _rng_object(policy, rng.capture())
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), policy.context.dp_cp_group)
        with _failures_named(partial_):
            request = dist_checkpointing.save(
                state,
                str(partial_),
                strategy,
                async_sharded_save=True,
                preprocess_common_before_consistancy_check=_without_extra,
                **_own_writer(dist_checkpointing.save),
            )
        assert request is not None
        if request.async_fn is not None:
            transforms = request.async_fn.args[0]  # Megatron's own: nothing, unless somebody registered some
            request = request._replace(async_fn=partial(_write, transforms))
        publish = partial(self._publish, partial_, target, step, dict(metrics or {}))
        if is_complete:
            request.add_finalize_fn(publish)
        else:
            self._late = _Late(partial_ / _LATE_FILE, publish)
        with _failures_named(partial_):
            if self.config.asynchronous:
                self._calls.schedule_async_request(request)
            else:
                request.execute_sync()
        return target

    def complete(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The rest of a save that was not complete: ``tensors`` on CPU, by ``section.name`` in :attr:`Loaded.extra`."""
        late = self._late
        assert late is not None, "no save waits for more"
        _on_rank_0(partial(_write_late, late.path, tensors), late.path)
        late.is_there = True
        self.poll()

    def poll(self) -> None:
        """Complete a save whose processes have all finished; returns at once if one has not."""
        self._finalize(blocking=False)

    def wait(self) -> None:
        """Return when nothing is being written.  What waits for :meth:`complete` goes on waiting."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        late = self._late
        try:
            with _failures_named(self.folder):
                self._calls.maybe_finalize_async_calls(blocking=blocking)
        except CheckpointError:
            self._late = None  # there is no such checkpoint
            raise
        if late is not None and late.is_there and not self._calls.get_num_unfinalized_calls():
            self._late = None
            late.publish()

    def _publish(self, written: Path, target: Path, step: int, metrics: Mapping[str, float]) -> None:
        dist.barrier()

        def publish() -> None:
            files.write_summary(written, step, metrics)
            files.write_sums(written, _collected_sums(written))
            written.rename(target)
            files.sync_folder(self.folder)
            config = self.config
            if config.keep_best and not files.is_measured(config.best_metric, metrics):
                _log.warning(
                    "checkpoint.best_metric %s was not measured in step %d, so this checkpoint is not among the best; "
                    "measured were %s", config.best_metric, step, ", ".join(sorted(metrics)) or "no metrics"
                )  # fmt: skip
            for old in files.superfluous(
                self.folder,
                keep_last=config.keep_last,
                keep_best=config.keep_best,
                best_metric=config.best_metric,
            ):
                shutil.rmtree(old)

        _on_rank_0(publish, written)


@dataclass(slots=True)
class _Late:
    """A save whose last file is not there yet."""

    path: Path
    publish: Callable[[], None]
    is_there: bool = False


def late_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What :meth:`CheckpointWriter.complete` brought, by ``section.name``; nothing if the save was complete."""
    file = path / _LATE_FILE
    return load_file(file) if file.is_file() else {}


def _write_late(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def named_or_latest(config: RestConfig) -> Path:
    """``checkpoint.load``, or the newest complete checkpoint of the run folder; ConfigError if there is neither."""
    if config.checkpoint.load:
        return Path(config.checkpoint.load)
    found = latest(Path(config.trainer.run_dir) / "checkpoints")
    if found is None:
        raise ConfigError(f"{config.trainer.run_dir} has no complete checkpoint: name one with checkpoint.load=")
    return found


def newest_intact(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file is what was written, and a line about each newer one that is not.

    Damaged ones get the suffix ``.damaged``, so that they are neither loaded nor counted again.  ``(None, [])`` if
    there is no checkpoint at all.  Ranks share the reading.  Collective over all ranks: one broadcast of names, and for
    each checkpoint looked at one all-gather of findings.

    Raises:
        CheckpointError: there are checkpoints and none of them is intact.
    """
    folder = Path(folder)
    listed: list[Any] = [[path.name for path in files.complete(folder)] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(listed, src=0)  # one listing: shared storage may show it to ranks at different times
    notes: list[str] = []
    for path in (folder / name for name in reversed(listed[0])):
        found = _damage(path)
        if not found:
            return path, notes
        notes.append(f"{path} is DAMAGED: {'; '.join(found[:3])}{f' and {len(found) - 3} more' if found[3:] else ''}")
        _on_rank_0(partial(path.rename, _damaged_name(path)), path)
    if notes:
        raise CheckpointError(
            f"no checkpoint in {folder} is intact, so there is nothing to continue from:\n  "
            + "\n  ".join(notes)
            + "\nrestore one from a backup, or move that folder away to start from the beginning"
            + see(Topic.NO_START)
        )
    return None, notes


def load(path: str | Path, policy: MegatronPolicy, *, is_verified: bool = False) -> Loaded:
    """Fill model, optimiser and schedule from a checkpoint, of any layout if its form is ``ANY_LAYOUT``.  Collective.

    Every file is compared with its sum first, unless :func:`newest_intact` has just done that (``is_verified``).
    Nothing in the folder is executed (``mcore/safe_loading.py``).  Raises ConfigError on every rank if the checkpoint
    is incomplete, damaged, of another kind of optimiser, or of a layout that ours cannot read.
    """
    from megatron.core import dist_checkpointing

    path = Path(path)
    _check_whole(path, is_verified=is_verified)
    with data_only():
        common = _check_optimizer(path, policy)
        prepare_for_loading(policy.optimizer)
        wanted = _sharded_state(policy, is_loading=True, form=_form(common))
        is_same_layout = common["layout"] == _layout(policy)
        if is_same_layout:
            wanted["rng"] = _rng_object(policy, None)
        state = dist_checkpointing.load(wanted, str(path))
    for i, module in enumerate(policy.modules):
        module.load_state_dict(state[_chunk_key(policy, i)], strict=True)
    _load_optimizer(path, policy, state)
    extra = state["extra"]
    for name, tensor in late_tensors(path).items():
        section, _, key = name.partition(".")
        extra[section] = {**(extra.get(section) or {}), key: tensor}
    return Loaded(step=state["step"], extra=extra, rng=state["rng"] if is_same_layout else None)


def _load_optimizer(path: Path, policy: MegatronPolicy, state: dict[str, Any]) -> None:
    """Moments, masters and the count of updates from ``state``; what is configured stays as it is configured.

    Megatron's parameter groups carry their settings along: without this a run that is extended, or begun from another
    run's checkpoint, would go on with that run's learning rate and end of schedule.
    """
    settings = [{name: group[name] for name in _SETTINGS if name in group} for group in policy.optimizer.param_groups]
    schedule = policy.scheduler.state_dict()
    load_optimizer_state(policy.optimizer, state["optimizer"])
    for group, configured in zip(policy.optimizer.param_groups, settings, strict=True):
        group.update(configured)
    policy.scheduler.load_state_dict(state["scheduler"])
    changed = [
        f"{name} {state['scheduler'].get(name)} -> {value}"
        for name, value in schedule.items()
        if name != "num_steps" and state["scheduler"].get(name) != value
    ]
    if changed and dist.get_rank() == 0:
        _log.warning(
            "%s was saved under another schedule; the configured one counts from here, at update %d: %s",
            path, policy.scheduler.num_steps, ", ".join(changed),
        )  # fmt: skip


def load_model(path: str | Path, policy: MegatronPolicy) -> None:
    """Fill the model alone; the policy may have no optimiser, and its layout may be any.  Collective."""
    from megatron.core import dist_checkpointing

    _check_whole(Path(path), is_verified=False)
    with data_only():
        state = dist_checkpointing.load(_sharded_model(policy), str(path))
    for i, module in enumerate(policy.modules):
        module.load_state_dict(state[_chunk_key(policy, i)], strict=True)


def _check_whole(path: Path, *, is_verified: bool) -> None:
    found = [] if is_verified else _damage(path)
    if found:
        raise ConfigError(f"checkpoint.load: {path} is not a complete checkpoint: {'; '.join(found[:3])}")
    check_description(path)


def _damage(path: Path) -> list[str]:
    """What is wrong with a checkpoint, the same list on every rank, each of which has read its part of the files."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, files.damage(path, part=dist.get_rank(), num_parts=dist.get_world_size()))
    return list(dict.fromkeys(line for lines in found for line in lines))


def _damaged_name(path: Path) -> Path:
    """One that is free: the same step may be damaged twice."""
    names = (path.with_suffix(f".damaged{number or ''}") for number in range(1000))
    return next(name for name in names if not name.exists())


def _make_room(target: Path, partial_: Path) -> None:
    """An empty ``partial_``; what killed runs left half-written goes, and so does an older save of the same step."""
    for left in (target, *target.parent.glob("step_*.partial")):
        shutil.rmtree(left, ignore_errors=True)
    partial_.mkdir(parents=True)


def _on_rank_0(action: Callable[[], object], path: Path) -> None:
    """Run ``action`` on rank 0; if it fails there every rank raises :class:`CheckpointError` with the reason.

    Collective: one broadcast.
    """
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome = [f"{path}: {error.strerror or error}"]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(f"a checkpoint could not be written: {outcome[0]}{see(Topic.DISK_FULL)}")


def _write(transforms: list[Any], rank: int, buckets: list[Any], results: _ResultFile) -> None:
    """Write this rank's files and leave their sums beside them; runs in the forked process of an asynchronous save.

    Megatron starts one more process a file, and waits for ever if one of those is killed; threads do as well.
    """
    try:
        with ThreadPoolExecutor(max_workers=len(buckets)) as pool:
            outcomes = list(pool.map(partial(_write_file, transforms), range(len(buckets)), buckets))
        sums = {name: value for name, value, _ in outcomes}
        (Path(buckets[0][0]).parent / _SUMS_OF_RANK.format(rank)).write_text(json.dumps(sums))
        results.put({i: written for i, (_, _, written) in enumerate(outcomes)})
    except Exception as error:  # noqa: BLE001  Megatron tells all ranks
        folder = Path(buckets[0][0]).parent
        free = shutil.disk_usage(folder).free  # torch.save says "unexpected pos" when the disk is full
        results.put(OSError(f"{error} ({free / 1e6:.1f} MB are free in {folder})"))


def _write_file(transforms: list[Any], index: int, bucket: Any) -> tuple[str, str, Any]:
    """``(name, sum, what Megatron wants to know)`` of one file, synced to disk."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    outcome: queue.Queue[Any] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    running.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, running, use_fsync=True)
    _, written = outcome.get_nowait()
    if isinstance(written, Exception):
        raise written
    path, name, _ = bucket
    return name, files.file_sum(path), written


def _collected_sums(folder: Path) -> dict[str, str]:
    """Sums of all files: from the ranks that wrote them, and here of what only this rank writes."""
    sums: dict[str, str] = {}
    for path in folder.glob(_SUMS_OF_RANK.format("*")):
        sums |= json.loads(path.read_text())
        path.unlink()
    for name in files.files_of(folder):
        if name not in sums:
            sums[name] = files.file_sum(folder / name)
    return sums


def _layout(policy: MegatronPolicy) -> dict[str, int]:
    context = policy.context
    return {
        "world_size": context.world_size,
        "tp": context.tp_size,
        "pp": context.pp_size,
        "vpp": len(policy.chunks),
        "cp": context.cp_size,
        "ep": context.ep_size,
    }


def _rng_object(policy: MegatronPolicy, state: dict[str, Any] | None) -> Any:
    """One entry a rank, none of them a replica of another."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    context = policy.context
    return ShardedObject("rng", state, (context.world_size,), (context.rank,), replica_id=0)


def _own_writer(save: Callable[..., Any]) -> dict[str, str]:
    """From 0.19 on Megatron's default is a package of NVIDIA's; we write with what Megatron has itself."""
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


def _without_extra(common: dict[str, Any]) -> dict[str, Any]:
    """What ranks must agree on: Megatron broadcasts it from rank 0 and compares."""
    return {name: value for name, value in common.items() if name != "extra"}


def _chunk_key(policy: MegatronPolicy, i: int) -> str:
    return "model" if len(policy.chunks) == 1 else f"model{i}"


def _form(common: Mapping[str, Any]) -> str:
    return str(common.get("optimizer_form", ANY_LAYOUT))


def _metadata(policy: MegatronPolicy, form: str = ANY_LAYOUT) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": form,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": policy.context.dp_cp_group,
    }


def _sharded_model(policy: MegatronPolicy) -> dict[str, Any]:
    metadata = _metadata(policy)
    policy.gather_parameters()
    return {
        _chunk_key(policy, i): module.sharded_state_dict(metadata=metadata) for i, module in enumerate(policy.modules)
    }


def _sharded_state(policy: MegatronPolicy, *, is_loading: bool, form: str) -> dict[str, Any]:
    metadata, models = _metadata(policy, form), _sharded_model(policy)
    sharded = models if len(models) > 1 else models["model"]
    policy.restore()
    with torch.no_grad(), aligned(policy.optimizer):
        optimizer = policy.optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata)
        if form == AS_IT_LIES:
            clear_padding(optimizer)
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


def _check_optimizer(path: Path, policy: MegatronPolicy) -> dict[str, Any]:
    """What a checkpoint holds besides shards; refused if its optimiser state does not fit ours."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    common = load_common_state_dict(str(path))
    ours, saved = _optimizer_kind(policy), common["optimizer_kind"]
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
    _check_layout(path, common, _layout(policy))
    return common


def _check_layout(path: Path, common: Mapping[str, Any], ours: Mapping[str, int]) -> None:
    """Replicas may be more or fewer where the optimiser's state was written as it lay; the rest is its layout."""
    names = {
        "tp": "parallel.tensor_parallel",
        "pp": "parallel.pipeline_parallel",
        "vpp": "parallel.virtual_pipeline",
        "ep": "parallel.expert_parallel",
    }
    saved = common["layout"]
    if _form(common) == AS_IT_LIES and (other := [key for key in names if saved[key] != ours[key]]):
        raise ConfigError(
            f"checkpoint.load: {path} was saved at {' '.join(f'{names[key]}={saved[key]}' for key in other)}, with the "
            "optimiser's state as it lay there, which another layout cannot read: set it so, or on that layout's ranks "
            f"run megatron-rest reshard (--config RUN/run.yaml checkpoint.load={path}), which writes one for any layout"
        )


@contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    """PyTorch's exception is no ``Exception``, and as many tracebacks as there are ranks."""
    try:
        yield
    except CheckpointException as error:
        lines = [f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items())]
        lines = lines or ["another rank says why"]  # Megatron tells rank 0 alone
        more = f" and {len(lines) - 3} more ranks" if len(lines) > 3 else ""
        what = f"{'; '.join(lines[:3])}{more}{see(Topic.DISK_FULL)}"
        raise CheckpointError(f"a checkpoint in {path} could not be written: {what}") from error


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
            return RuntimeError("the process that wrote ended before it was done (killed, or out of memory)")
        value = pickle.loads(self.path.read_bytes())
        self.path.unlink()
        return value


def _leave_results_in(path: Path) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = _ResultFile(path)
