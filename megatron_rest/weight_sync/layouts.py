"""Where pieces of HF tensors lie in a training rank's shards and in a vLLM worker's parameters: pure data.

Both sides are described in the same words (:class:`Placement`: a box of an HF tensor and where it lies in a local one),
so a plan needs to know neither Megatron's nor vLLM's fusions.  The scales of a matrix in FP8 are one more HF tensor, as
they are in a checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_rest.model_map import (
    ModelShape,
    ParameterKind,
    ParameterSpec,
    expert_owner,
    hf_shapes,
    padded_vocab_size,
    parameter_map,
    shard_shape,
)

__all__ = [
    "EngineLayout",
    "EngineTensor",
    "Fp8Form",
    "Placement",
    "Shard",
    "TrainingLayout",
    "WorkerLayout",
    "engine_tensors",
    "engine_workers",
    "scale_tensor",
    "training_placements",
    "training_shards",
    "whole_tensors",
]

_VLLM_VOCAB_MULTIPLE = 64  # vLLM pads the vocabulary to it before cutting
_EXPERT = ".mlp.experts."


class Placement(NamedTuple):  # there are hundreds of thousands
    """A box of an HF tensor and where it lies in a local tensor.

    ``hf_start`` and ``size`` have the HF tensor's dimensions.  ``start`` may have more: the leading ones are indices
    (the expert in vLLM's stacked ``[experts, rows, columns]``).
    """

    hf_name: str
    hf_start: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]


class Shard(NamedTuple):
    """How a training rank holds a parameter: rank and size of the tensor parallelism that cut it."""

    tp_rank: int
    tp_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLayout:
    """Degrees of parallelism of the training side; what Megatron's order of ranks makes of them.

    As in Megatron the experts have a grid of their own: EP runs over the same TP x DP ranks of a stage, TP fastest.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    data_parallel: int = 1
    expert_parallel: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayout:
    """One vLLM engine: TP x DP workers; with ``expert_parallel`` its experts are spread over all of them."""

    tensor_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False

    @property
    def num_workers(self) -> int:
        return self.tensor_parallel * self.data_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLayout:
    """What decides which slices a vLLM worker holds."""

    tp_rank: int = 0
    tp_size: int = 1
    expert_tp_rank: int = 0
    expert_tp_size: int = 1
    experts: tuple[int, ...] = ()  # global ids in the order of the worker's stacked tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTensor:
    """A tensor that a worker takes: one of its own parameters, or (``is_whole``) a full HF tensor."""

    name: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    dtype: torch.dtype  # as the engine's loaders see it, which is what travels
    is_whole: bool = False

    @property
    def covered(self) -> int:
        """Elements that a transfer writes; the rest is padding and zero."""
        return sum(math.prod(p.size) for p in self.placements)

    @property
    def covered_bytes(self) -> int:
        """What travels for it."""
        return self.covered * self.dtype.itemsize

    def as_type(self, dtype: torch.dtype) -> EngineTensor:
        """The same places in another data type."""
        return dataclasses.replace(self, dtype=dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Form:
    """Which HF matrices an engine holds in FP8, and how many of their elements share a scale.

    A matrix ``w`` is held as ``q`` (e4m3) and ``scale`` (float32): ``w = q * scale``, element by element, with the
    scale of the block that the element lies in.  Blocks are counted from the start of the whole HF matrix, so they do
    not depend on how either side cuts it.
    """

    names: frozenset[str]  # HF names of the matrices
    scale_suffix: str  # a scale's name is its matrix's and this
    block: tuple[int, int | None]  # rows and columns of a block; None = all columns
    power_of_two: bool = False  # scales are rounded up to one, for kernels that would round them after the matrix

    def scale_name(self, hf_name: str) -> str:
        """Of the tensor with a matrix's scales."""
        return hf_name + self.scale_suffix

    def grid(self, start: Sequence[int], size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Start and size, in blocks, of the blocks that a box of a matrix touches."""
        begins, sizes = [], []
        for at, length, step in zip(start, size, self.block, strict=True):
            first, last = (0, 1) if step is None else (at // step, -(-(at + length) // step))
            begins.append(first)
            sizes.append(last - first)
        return (begins[0], begins[1]), (sizes[0], sizes[1])


# Training side ----------------------------------------------------------------------------------------------------


def training_placements(spec: ParameterSpec, shape: ModelShape, tp_rank: int, tp_size: int) -> Iterator[Placement]:
    """Where the HF tensors of ``spec`` lie in one TP rank's Megatron shard; vocabulary padding is left out."""
    full = hf_shapes(spec, shape)
    local = shard_shape(spec, shape, tp_size)  # refuses what cannot be cut
    rest, zeros = full[0][1:], (0,) * (len(full[0]) - 1)
    if spec.kind is ParameterKind.QKV:
        groups, head = shape.num_query_groups // tp_size, shape.head_dim
        rows = (shape.num_attention_heads // shape.num_query_groups * head, head, head)
        at = 0
        for group in range(tp_rank * groups, (tp_rank + 1) * groups):
            for name, size in zip(spec.hf_names, rows, strict=True):
                yield Placement(name, (group * size, *zeros), (at, *zeros), (size, *rest))
                at += size
    elif spec.kind is ParameterKind.GATE_UP:
        size = local[0] // 2
        begin = 0 if spec.shard_dim is None else tp_rank * size
        for i, name in enumerate(spec.hf_names):
            yield Placement(name, (begin, *zeros), (i * size, *zeros), (size, *rest))
    elif spec.kind is ParameterKind.VOCAB:
        begin = tp_rank * local[0]
        size = min(local[0], shape.vocab_size - begin)
        if size > 0:
            yield Placement(spec.hf_names[0], (begin, *zeros), (0, *zeros), (size, *rest))
    else:
        start = [0] * len(local)
        if spec.shard_dim is not None:
            start[spec.shard_dim] = tp_rank * local[spec.shard_dim]
        yield Placement(spec.hf_names[0], tuple(start), (0,) * len(local), local)


def training_shards(shape: ModelShape, layout: TrainingLayout) -> list[dict[str, Shard]]:
    """What every training rank holds, from the layout alone; ranks in Megatron's order (TP, then DP, then PP).

    A running trainer does not need it: there every rank says what it holds.
    """
    chunks = layout.pipeline_parallel * layout.virtual_pipeline
    stage_ranks = layout.tensor_parallel * layout.data_parallel
    if shape.num_layers % chunks:
        raise ValueError(f"{shape.num_layers} layers cannot be cut into {chunks} equal pipeline chunks")
    if shape.num_experts % layout.expert_parallel or stage_ranks % layout.expert_parallel:
        raise ValueError(
            f"expert_parallel {layout.expert_parallel} does not divide {shape.num_experts} experts and {stage_ranks} "
            "ranks of a stage"
        )
    ranks: list[dict[str, Shard]] = [{} for _ in range(layout.num_ranks)]
    for spec in parameter_map(shape):
        stage = _stage(spec.megatron_name, shape, chunks) % layout.pipeline_parallel
        for i in range(stage_ranks):
            if spec.expert is None:
                shard = Shard(i % layout.tensor_parallel, layout.tensor_parallel)
            elif expert_owner(spec.expert, shape.num_experts, layout.expert_parallel) == i % layout.expert_parallel:
                shard = Shard(0, 1)  # never cut
            else:
                continue
            ranks[stage * stage_ranks + i][spec.megatron_name] = shard
    return ranks


def _stage(name: str, shape: ModelShape, chunks: int) -> int:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) * chunks // shape.num_layers
    return 0 if name.startswith("embedding") else chunks - 1


# Engine side ------------------------------------------------------------------------------------------------------


def engine_workers(shape: ModelShape, layout: EngineLayout) -> list[WorkerLayout]:
    """Workers of a vLLM engine in rank order (TP runs fastest), as vLLM's defaults lay them out.

    A running engine says so itself; this is for planning without one.
    """
    size = layout.num_workers
    workers = []
    for rank in range(size):
        base, more = divmod(shape.num_experts, size) if layout.expert_parallel else (shape.num_experts, 0)
        begin = rank * base + min(rank, more) if layout.expert_parallel else 0
        workers.append(
            WorkerLayout(
                tp_rank=rank % layout.tensor_parallel,
                tp_size=layout.tensor_parallel,
                expert_tp_rank=0 if layout.expert_parallel else rank,
                expert_tp_size=1 if layout.expert_parallel else size,
                experts=tuple(range(begin, begin + base + (rank < more))),
            )
        )
    return workers


def engine_tensors(
    shape: ModelShape, worker: WorkerLayout, dtype: torch.dtype, form: Fp8Form | None = None
) -> list[EngineTensor]:
    """Parameters of a vLLM worker for this model, in layer order, with vLLM's names and fusions.

    The shapes are those that vLLM's weight loaders fill, before any packing or quantisation of its own.  A tied head
    has no entry: it follows the embedding.  The matrices of ``form`` are in FP8, each followed by its scales, all else
    is in ``dtype``.  Raises ValueError when TP cuts through a head, a row or a block.
    """
    tensors: list[EngineTensor] = []
    for slot in _slots(shape, worker):
        tensor = EngineTensor(name=slot.name, shape=slot.shape, placements=slot.placements, dtype=dtype)
        if form is None or not any(placement.hf_name in form.names for placement in slot.placements):
            tensors.append(tensor)
        else:
            tensors += [tensor.as_type(torch.float8_e4m3fn), scale_tensor(tensor, form)]
    return tensors


def scale_tensor(tensor: EngineTensor, form: Fp8Form) -> EngineTensor:
    """The parameter with the scales of ``tensor``: what lies where follows from where the matrices lie."""
    placements = []
    for box in tensor.placements:
        lead = len(box.start) - len(box.size)
        hf_start, size = form.grid(box.hf_start, box.size)
        start, room = form.grid(box.start[lead:], box.size)
        ends = [at + length for at, length in zip(box.hf_start, box.size, strict=True)]
        cuts = [
            step is not None and (at % step or begin % step)
            for at, begin, step in zip(box.hf_start, box.start[lead:], form.block, strict=True)
        ]
        if any(cuts) or size != room:
            raise ValueError(
                f"{tensor.name} holds rows and columns {box.hf_start} to {tuple(ends)} of {box.hf_name}, which cuts "
                f"through FP8 blocks of {form.block}: choose another engine parallelism, or scales by channel"
            )
        placements.append(Placement(form.scale_name(box.hf_name), hf_start, (*box.start[:lead], *start), size))
    lead = len(tensor.shape) - len(form.block)
    _, grid = form.grid((0, 0), tensor.shape[lead:])
    return EngineTensor(
        name=form.scale_name(tensor.name),
        shape=(*tensor.shape[:lead], *grid),
        placements=tuple(placements),
        dtype=torch.float32,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slot:
    """A parameter of a worker before anybody says how it is stored."""

    name: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]


def _slots(shape: ModelShape, worker: WorkerLayout) -> list[_Slot]:
    tensors = [_engine_vocab(shape, worker, "model.embed_tokens.weight")]
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        tensors += _engine_attention(shape, worker, prefix)
        is_moe = shape.num_experts > 0 and layer not in shape.dense_layers
        tensors += _engine_experts(shape, worker, prefix) if is_moe else _engine_mlp(shape, worker, prefix)
    tensors.append(_replicated("model.norm.weight", shape.hidden_size))
    if not shape.tied_embeddings:
        tensors.append(_engine_vocab(shape, worker, "lm_head.weight"))
    return tensors


def _engine_vocab(shape: ModelShape, worker: WorkerLayout, name: str) -> _Slot:
    rows = padded_vocab_size(shape.vocab_size, 1, _VLLM_VOCAB_MULTIPLE) // worker.tp_size
    begin = worker.tp_rank * rows
    size = max(min(rows, shape.vocab_size - begin), 0)
    placement = Placement(name, (begin, 0), (0, 0), (size, shape.hidden_size))
    return _Slot(name=name, shape=(rows, shape.hidden_size), placements=(placement,) if size else ())


def _engine_attention(shape: ModelShape, worker: WorkerLayout, prefix: str) -> list[_Slot]:
    heads = _divide(shape.num_attention_heads, worker.tp_size, "attention heads")
    if worker.tp_size >= shape.num_query_groups:  # vLLM gives several ranks the same key/value head
        kv_heads, kv_begin = 1, worker.tp_rank // _divide(worker.tp_size, shape.num_query_groups, "engine TP ranks")
    else:
        kv_heads = _divide(shape.num_query_groups, worker.tp_size, "key/value heads")
        kv_begin = worker.tp_rank * kv_heads
    head = shape.head_dim
    parts = [("q", worker.tp_rank * heads, heads), ("k", kv_begin, kv_heads), ("v", kv_begin, kv_heads)]
    attention = f"{prefix}.self_attn"
    tensors = [_replicated(f"{prefix}.input_layernorm.weight", shape.hidden_size)]
    for kind in ("weight", "bias") if shape.has_qkv_bias else ("weight",):
        rest = (shape.hidden_size,) if kind == "weight" else ()
        placements, at = [], 0
        for part, begin, count in parts:
            name = f"{attention}.{part}_proj.{kind}"
            zeros = (0,) * len(rest)
            placements.append(Placement(name, (begin * head, *zeros), (at, *zeros), (count * head, *rest)))
            at += count * head
        tensors.append(_Slot(name=f"{attention}.qkv_proj.{kind}", shape=(at, *rest), placements=tuple(placements)))
    if shape.has_qk_norm:
        tensors += [_replicated(f"{attention}.{part}_norm.weight", head) for part in "qk"]
    tensors.append(_columns(f"{attention}.o_proj.weight", shape.hidden_size, heads * head, worker.tp_rank))
    return tensors


def _engine_mlp(shape: ModelShape, worker: WorkerLayout, prefix: str) -> list[_Slot]:
    size = _divide(shape.ffn_hidden_size, worker.tp_size, "rows of the MLP")
    placements = tuple(
        Placement(
            f"{prefix}.mlp.{part}_proj.weight", (worker.tp_rank * size, 0), (i * size, 0), (size, shape.hidden_size)
        )
        for i, part in enumerate(("gate", "up"))
    )
    return [
        _replicated(f"{prefix}.post_attention_layernorm.weight", shape.hidden_size),
        _Slot(name=f"{prefix}.mlp.gate_up_proj.weight", shape=(2 * size, shape.hidden_size), placements=placements),
        _columns(f"{prefix}.mlp.down_proj.weight", shape.hidden_size, size, worker.tp_rank),
    ]


def _engine_experts(shape: ModelShape, worker: WorkerLayout, prefix: str) -> list[_Slot]:
    size = _divide(shape.moe_ffn_hidden_size, worker.expert_tp_size, "rows of an expert")
    begin, hidden = worker.expert_tp_rank * size, shape.hidden_size
    up, down = [], []
    rows, columns, first, second = (begin, 0), (0, begin), (size, hidden), (hidden, size)
    for slot, expert in enumerate(worker.experts):
        theirs = f"{prefix}{_EXPERT}{expert}"
        up += [
            Placement(f"{theirs}.gate_proj.weight", rows, (slot, 0, 0), first),
            Placement(f"{theirs}.up_proj.weight", rows, (slot, size, 0), first),
        ]
        down.append(Placement(f"{theirs}.down_proj.weight", columns, (slot, 0, 0), second))
    count, stacked = len(worker.experts), f"{prefix}.mlp.experts.routed_experts"
    router = f"{prefix}.mlp.gate.weight"
    return [
        _replicated(f"{prefix}.post_attention_layernorm.weight", hidden),
        _Slot(
            name=router,
            shape=(shape.num_experts, hidden),
            placements=(Placement(router, (0, 0), (0, 0), (shape.num_experts, hidden)),),
        ),
        _Slot(name=f"{stacked}.w13_weight", shape=(count, 2 * size, hidden), placements=tuple(up)),
        _Slot(name=f"{stacked}.w2_weight", shape=(count, hidden, size), placements=tuple(down)),
    ]


def _replicated(name: str, size: int) -> _Slot:
    return _Slot(name=name, shape=(size,), placements=(Placement(name, (0,), (0,), (size,)),))


def _columns(name: str, rows: int, columns: int, tp_rank: int) -> _Slot:
    placement = Placement(name, (0, tp_rank * columns), (0, 0), (rows, columns))
    return _Slot(name=name, shape=(rows, columns), placements=(placement,))


def _divide(count: int, parts: int, what: str) -> int:
    if count % parts:
        raise ValueError(f"{count} {what} cannot be divided by {parts}")
    return count // parts


def whole_tensors(
    tensors: Sequence[EngineTensor],
    shape: ModelShape,
    refused: Collection[str],
    *,
    form: Fp8Form | None = None,
) -> list[EngineTensor]:
    """``tensors`` with each one that the engine does not take in slices replaced by the full HF tensors it is made of.

    ``refused`` has the names of those.
    """
    full = {
        name: size
        for spec in parameter_map(shape)
        for name, size in zip(spec.hf_names, hf_shapes(spec, shape), strict=True)
    }
    if form is not None:
        full |= {form.scale_name(name): form.grid((0, 0), full[name])[1] for name in form.names}
    result: list[EngineTensor] = []
    for tensor in tensors:
        if tensor.name not in refused:
            result.append(tensor)
            continue
        names: Iterable[str] = dict.fromkeys(p.hf_name for p in tensor.placements)
        prefix, is_expert, stacked = tensor.name.partition(f"{_EXPERT}routed_experts.")
        if is_expert:  # vLLM's loader picks its own experts
            kinds, kind = ("gate", "up") if stacked.startswith("w13") else ("down",), stacked.partition("_")[2]
            names = [f"{prefix}{_EXPERT}{e}.{k}_proj.{kind}" for e in range(shape.num_experts) for k in kinds]
        for name in names or [tensor.name]:
            origin = (0,) * len(full[name])
            placement = Placement(name, origin, origin, full[name])
            result.append(
                EngineTensor(name=name, shape=full[name], placements=(placement,), dtype=tensor.dtype, is_whole=True)
            )
    return result
