"""What Megatron-Core 0.16 gets wrong when it saves and loads the distributed optimiser's state.

The distributed optimiser keeps a flat shard of every parameter in a buffer that is cut into buckets.

* :func:`aligned`: for a checkpoint of any layout it puts the shards together without the padding between buckets, and
  then cuts parameters out at offsets that count the padding.  From the second bucket on, state and float32 weights of
  one parameter are saved as another's; a tied embedding in a pipeline has a bucket of its own, so then nearly all are.
* :func:`prepare_for_loading`, :func:`load_optimizer_state`: where Adam is PyTorch's own (no Transformer Engine, no
  Apex) it trips over the one entry that is no shard, ``step``: a fresh optimiser has none (an assertion), a loaded one
  has no counterpart in the checkpoint (``KeyError: 'step'``), and what it puts there is one tensor for all parameters,
  which Adam would count up once for each.
* :func:`clear_padding`: between parameters that are written as they lie it writes whatever is in fresh memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

__all__ = ["aligned", "clear_padding", "is_distributed", "load_optimizer_state", "prepare_for_loading"]


def is_distributed(optimizer: Any) -> bool:
    """Whether the state is sharded over data-parallel ranks."""
    return any(_is_distributed_part(part) for part in _parts(optimizer))


@contextmanager
def aligned(optimizer: Any) -> Iterator[None]:
    """While it lasts, the sharded state of ``optimizer`` is cut where its parameters are."""
    parts = [part for part in _parts(optimizer) if _is_distributed_part(part)]
    for part in parts:
        part.get_parameter_state_dp_zero = partial(_with_padding, part, part.get_parameter_state_dp_zero)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero


def _with_padding(optimizer: Any, get_state: Any, **options: Any) -> Any:
    """``get_parameter_state_dp_zero`` whose flat tensors keep the padding between buckets."""
    state = get_state(**options)
    for number, by_dtype in () if state is None else state.items():
        if number == "buckets_coalesced":
            continue
        buffer = optimizer.buffers[number]
        for tensors in by_dtype.values():
            for key in ("param", "exp_avg", "exp_avg_sq"):
                compact = tensors[key].split([bucket.numel_unpadded for bucket in buffer.buckets])
                tensors[key] = compact[0].new_zeros(buffer.numel)
                for bucket, values in zip(buffer.buckets, compact, strict=True):
                    tensors[key][bucket.offset : bucket.offset + len(values)] = values
    return state


def clear_padding(state: dict[Any, Any]) -> None:
    """Zeros in what lies between the parameters of a sharded state in the form ``dp_reshardable``."""
    parts = [state] if "param_state" in state else list(state.values())
    for part in parts:
        buffers = [value for key, value in part["param_state"].items() if isinstance(key, int)]
        for entry in (e for by_dtype in buffers for buckets in by_dtype.values() for b in buckets for e in b):
            if entry["padding"].obj:
                for name, value in entry.items():
                    if name not in ("padding", "step"):
                        value.data.zero_()


def prepare_for_loading(optimizer: Any) -> None:
    """Zeros where the state will go, so that its sharded description can be asked for."""
    for part in _parts_to_mend(optimizer):
        inner = part.optimizer
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@torch.no_grad()
def load_optimizer_state(optimizer: Any, state: dict[Any, Any]) -> None:
    """``optimizer.load_state_dict(state)`` for a loaded ``state``; the optimiser went through
    :func:`prepare_for_loading`."""
    if not list(_parts_to_mend(optimizer)):
        optimizer.load_state_dict(state)
        return
    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else [part for _, part in sorted(state.items())]
    for part, its in zip(parts, states, strict=True):
        shards, kind = its.pop("param_state"), its.pop("param_state_sharding_type")
        part.load_state_dict(its)
        steps = {p: values.pop("step") for p, values in part.optimizer.state.items()}
        if kind == "dp_reshardable":
            part.load_parameter_state_from_dp_reshardable(shards)
        elif kind == "fully_reshardable":
            part.load_parameter_state_from_fully_reshardable(shards)
        else:
            raise ValueError(f"optimiser state is {kind!r}, expected 'fully_reshardable' or 'dp_reshardable'")
        for p, step in steps.items():
            part.optimizer.state[p]["step"] = step.clone()


def _parts(optimizer: Any) -> list[Any]:
    """Megatron chains one optimiser for the experts to that for the rest."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _parts_to_mend(optimizer: Any) -> Iterator[Any]:
    for part in _parts(optimizer):
        if _is_distributed_part(part) and isinstance(part.optimizer, torch.optim.Adam):
            yield part


def _is_distributed_part(part: Any) -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(part, DistributedOptimizer)
