"""What running engines take, from what their workers say of themselves (``WorkerExtension.weight_layout``)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rest.model_map import ModelShape
from megatron_rest.weight_sync.layouts import EngineTensor, Fp8Form, WorkerLayout, engine_tensors, whole_tensors
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weight_sync.transport import SyncTarget, machine_of

__all__ = ["Hello", "fp8_form", "introductions", "worker_tensors"]

_FP8 = torch.float8_e4m3fn
_SUFFIXES = ("_scale_inv", "_scale")  # what checkpoints and vLLM call scales: of DeepSeek's form, of compressed-tensors


@dataclass(frozen=True, slots=True)
class Hello:
    """What a rank says of its engine before anything is planned or sent."""

    layout: list[dict[str, Any]] | None  # of the engine's workers; None = no engine
    error: str
    host: str


def introductions(source: MegatronWeightSource, engine: SyncTarget | None) -> list[Hello]:
    """What every rank of the source says, in rank order, on every rank; one gather of objects.

    Raises ConnectionError on every rank when an engine did not say how it is laid out.
    """
    hellos: list[Hello] = source.all_gather(_hello(engine))
    if problems := [hello.error for hello in hellos if hello.error]:
        raise ConnectionError(f"an engine did not say how it is laid out: {'; '.join(problems)}")
    return hellos


def _hello(engine: SyncTarget | None) -> Hello:
    host = machine_of(engine)
    if engine is None:
        return Hello(None, "", host)
    try:
        return Hello(engine.weight_layout(), "", host)
    except Exception as e:  # noqa: BLE001  every rank raises it
        return Hello(None, f"{type(e).__name__}: {e}", host)


def worker_tensors(
    shape: ModelShape, layout: Sequence[Mapping[str, Any]]
) -> tuple[list[list[EngineTensor]], Fp8Form | None]:
    """What each worker of an engine takes, in layer order and in its own data types, and what of it is in FP8.

    A parameter that a worker holds in the table's shape is taken in slices.  One with another shape or name (another
    version of vLLM, a padded kernel) is taken whole, through vLLM's own loader, by all workers alike.  Raises
    ValueError naming a parameter whose quantisation the sender does not know.
    """
    workers, held = _workers(layout), _held(layout)
    form = fp8_form(shape, layout)
    floats = {dtype for of_worker in held for _, dtype in of_worker.values() if dtype.itemsize > 1}
    # Of tensors that only vLLM's loader can place nobody says the type: nothing may be rounded on the way.
    widest = functools.reduce(torch.promote_types, floats)
    tables = [engine_tensors(shape, worker, widest, form) for worker in workers]
    refused = {
        tensor.name
        for table, known in zip(tables, held, strict=True)
        for tensor in table
        if known.get(tensor.name, ((), None))[0] != tensor.shape
    }
    return [
        whole_tensors(
            [tensor if tensor.name in refused else tensor.as_type(known[tensor.name][1]) for tensor in table],
            shape,
            refused,
            form=form,
        )
        for table, known in zip(tables, held, strict=True)
    ], form


def fp8_form(shape: ModelShape, layout: Sequence[Mapping[str, Any]]) -> Fp8Form | None:
    """What an engine holds in FP8 and how, None for nothing; raises as :func:`worker_tensors` does."""
    held = _held(layout)
    weight_block: Sequence[int] | None = layout[0].get("weight_block")
    odd = sorted({f"{n} ({d})" for known in held for n, (_, d) in known.items() if not _is_known(d)})
    if odd:
        raise ValueError(f"the engine holds {odd[0]}, a quantisation that the sender does not know: FP8 (e4m3) only")
    fp8 = {name for known in held for name, (_, dtype) in known.items() if dtype is _FP8}
    if not fp8:
        return None
    tables = [engine_tensors(shape, worker, _FP8) for worker in _workers(layout)]
    if unknown := sorted(fp8 - {tensor.name for table in tables for tensor in table}):
        raise ValueError(f"the engine holds {unknown[0]} in FP8, which is no matrix of this model's table")
    suffix = next((s for s in _SUFFIXES if all(name + s in known for known in held for name in fp8 & known.keys())), "")
    form = Fp8Form(
        names=frozenset(p.hf_name for table in tables for t in table if t.name in fp8 for p in t.placements),
        scale_suffix=suffix,
        block=(1, None) if weight_block is None else (int(weight_block[0]), int(weight_block[1])),
        power_of_two=weight_block is not None and bool(layout[0].get("power_of_two_scales")),
    )
    for known in held:
        for name in fp8 & known.keys():
            scale = known[name + suffix][0] if suffix else "nowhere"
            if not suffix or (weight_block is None and scale != (*known[name][0][:-1], 1)):
                raise ValueError(
                    f"the engine holds {name} in FP8 with scales {scale}, and the sender makes one for each output "
                    "channel or one for each block (rollout.quantization)"
                )
    return form


def _workers(layout: Sequence[Mapping[str, Any]]) -> list[WorkerLayout]:
    return [WorkerLayout(**{**entry["layout"], "experts": tuple(entry["layout"]["experts"])}) for entry in layout]


def _held(layout: Sequence[Mapping[str, Any]]) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Shape and data type of each worker's parameters, by name."""
    return [{name: (tuple(size), getattr(torch, dtype)) for name, size, dtype in said["parameters"]} for said in layout]


def _is_known(dtype: torch.dtype) -> bool:
    return dtype is _FP8 or (dtype.is_floating_point and dtype.itemsize > 1)
