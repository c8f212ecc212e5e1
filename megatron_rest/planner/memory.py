"""Bytes of one rank of every pipeline stage, item by item."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rest.config import Fp8Recipe, RestConfig, RolloutQuantization
from megatron_rest.data.alignment import packing_alignment
from megatron_rest.model_map import ModelShape, hf_shapes, padded_vocab_size, parameter_map
from megatron_rest.passes import least_microbatches, microbatches_multiple, shares_prompts
from megatron_rest.planner.activations import layer_bytes
from megatron_rest.planner.hardware import Hardware
from megatron_rest.planner.parameters import StageParameters, count_stages, layers_of_chunk, total_parameters
from megatron_rest.weight_sync.limits import MESSAGES_UNDER_WAY, PACKED_BYTES

__all__ = [
    "Item",
    "StageMemory",
    "engine_memory",
    "engine_weight_bytes",
    "itemsize",
    "kv_bytes_per_token",
    "offloaded_bytes",
    "stage_memories",
]

_FP32 = 4
_GATHERED = 12  # bytes a parameter: master and two moments (mcore/checkpoint.py, "any layout")
_LOGITS_BLOCK, _LOGITS_BLOCK_CPU = 512 << 20, 64 << 20  # ops/fused_linear.py: block_size=None
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def itemsize(dtype: str) -> int:
    return _SIZES[dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One line of the table."""

    name: str
    num_bytes: int
    why: str  # the numbers that made it


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """One rank of a pipeline stage.  Sampling, training and syncing do not happen at once: the largest counts."""

    stage: int
    always: tuple[Item, ...]
    sampling: tuple[Item, ...]
    training: tuple[Item, ...]
    syncing: tuple[Item, ...]

    @property
    def peak(self) -> int:
        return _sum(self.always) + max(_sum(phase) for phase in (self.sampling, self.training, self.syncing))

    @property
    def training_peak(self) -> int:
        """Without the engine and what is not ours: what a tracker of this process's tensors sees in an update."""
        return sum(item.num_bytes for item in self.always if item.name in _OURS) + _sum(self.training)

    @property
    def owned(self) -> int:
        """What this rank writes into a checkpoint as it lies: nothing of its replicas', nothing gathered."""
        held = {item.name: item.num_bytes for item in self.always}
        return held["weights"] + held["optimiser"]

    @property
    def gathered(self) -> int:
        """What it holds in host memory to write one for any layout: its replicas' masters and moments, too."""
        held = {item.name: item.num_bytes for item in self.always}
        return held["weights"] + held["gradients"] // _FP32 * _GATHERED


_OURS = ("weights", "FP8 copies", "gradients", "optimiser")
_AWAY = ("gradients", "optimiser")  # while engines sample, with trainer.offload


def stage_memories(config: RestConfig, shape: ModelShape, hardware: Hardware, *, world_size: int) -> list[StageMemory]:
    """One entry a pipeline stage."""
    stages = count_stages(shape, config.parallel)
    engine = () if config.rollout.replicas else engine_memory(config, shape, hardware)
    is_asleep = config.rollout.sleep_level > 0 and not hardware.is_cpu  # gives its memory back while the policy trains
    updates = [_training(config, shape, hardware, held, stage, world_size) for stage, held in enumerate(stages)]
    states = [_state(config, held, world_size) for held in stages]
    # On CPU the host's memory is the device's.
    away = _AWAY if config.trainer.offload and not hardware.is_cpu else ()
    return [
        StageMemory(
            stage=stage,
            always=(
                *(item for item in states[stage] if item.name not in away),
                *(() if is_asleep else engine),
                _not_ours(hardware, update),
            ),
            sampling=engine if is_asleep else (),
            training=(*(item for item in states[stage] if item.name in away), *update),
            syncing=(*_syncing(config, shape, held), *(engine[:1] if is_asleep else ())),
        )
        for stage, (held, update) in enumerate(zip(stages, updates, strict=True))
    ]


def offloaded_bytes(config: RestConfig, shape: ModelShape, *, world_size: int) -> int:
    """Optimiser state that a rank of the largest stage sends to its host, and takes back, once a step."""
    if not config.trainer.offload:
        return 0
    states = [_state(config, held, world_size) for held in count_stages(shape, config.parallel)]
    return max(item.num_bytes for state in states for item in state if item.name == "optimiser")


def _not_ours(hardware: Hardware, update: tuple[Item, ...]) -> Item:
    """What libraries hold, and on CPU what the C library's heap keeps free between the blocks of updates."""
    why = "CUDA context, NCCL, fragmentation: assumed"
    if hardware.is_cpu:
        why = f"libraries, engine, holes of {hardware.holes:.0%} of an update: measured"
    return Item(name="not ours", num_bytes=hardware.reserve + int(hardware.holes * _sum(update)), why=why)


def _num_microbatches(config: RestConfig, *, world_size: int) -> int:
    """Of one update and replica, if all sequences are longest and whole (``data/packing.py`` has the rule)."""
    p = config.parallel
    dp, sequences = p.data_parallel(world_size), _sequences(config)
    least = min(least_microbatches(p), -(-sequences // dp))
    in_one = config.trainer.max_tokens_per_microbatch // _longest(config)
    multiple = microbatches_multiple(p)
    return -(-max(-(-sequences // (dp * in_one)), least) // multiple) * multiple


def kv_bytes_per_token(config: RestConfig, shape: ModelShape) -> int:
    """Keys and values of one token on one GPU of a replica."""
    heads = max(shape.num_query_groups // config.rollout.tensor_parallel, 1)
    return 2 * shape.num_layers * heads * shape.head_dim * itemsize(config.rollout.dtype)


def _state(config: RestConfig, held: StageParameters, world_size: int) -> tuple[Item, ...]:
    """Weights, gradient buffer, masters and moments."""
    p = config.parallel
    size = itemsize(config.model.dtype)
    is_fp8 = config.precision.recipe is not Fp8Recipe.NONE
    weights = held.total * size
    why = f"{held.total / 1e9:.3f} G parameters x {size} bytes"
    items = []
    if is_fp8 and config.precision.parameters:
        weights -= held.layer_matrices * size
        why += ", layers' matrices in FP8 only"
    items.append(Item(name="weights", num_bytes=weights, why=why))
    if is_fp8:
        items.append(
            Item(
                name="FP8 copies",
                num_bytes=2 * held.layer_matrices,
                why=f"{held.layer_matrices / 1e9:.3f} G of them in layers' matrices x 2, as they are and transposed",
            )
        )
    items.append(Item(name="gradients", num_bytes=held.total * _FP32, why="x 4 bytes: reduced in float32"))
    state = 12 if size == 2 or is_fp8 else 8  # float32 masters only where the weights are not float32 themselves
    shards, expert_shards = 1, 1
    if p.distributed_optimizer:
        replicas = p.data_parallel(world_size) * p.context_parallel
        shards, expert_shards = replicas, max(replicas * p.tensor_parallel // p.expert_parallel, 1)
    num_bytes = held.dense * state // shards + held.experts * state // expert_shards
    over = f" over {shards} replicas" if shards > 1 else ""
    items.append(Item(name="optimiser", num_bytes=num_bytes, why=f"x {state} bytes{over}: masters, two moments"))
    return tuple(items)


def _training(
    config: RestConfig, shape: ModelShape, hardware: Hardware, held: StageParameters, stage: int, world_size: int
) -> tuple[Item, ...]:
    """Live at the worst moment of an update: as many microbatches in flight as this stage has, one backward begun."""
    p = config.parallel
    size = itemsize(config.model.dtype)
    tokens = _tokens_per_rank(config, world_size)
    layer = layer_bytes(
        shape, p, itemsize=size, is_fp8=config.precision.recipe is not Fp8Recipe.NONE, is_cpu=hardware.is_cpu
    )
    chunk = layers_of_chunk(shape, p)
    in_flight = _chunks_in_flight(config, stage, world_size)
    kept = layer.kept(p.recompute)
    items = [
        Item(
            name="activations",
            num_bytes=in_flight * chunk * tokens * kept,
            why=f"{tokens} tokens x {chunk} layers x {in_flight} chunks in flight x {kept / 1e3:.1f} kB"
            + (f", recompute {p.recompute}" if p.recompute != "none" else ""),
        )
    ]
    t = p.tensor_parallel
    if shares_prompts(config, has_transformer_engine=not hardware.is_cpu):
        seen = _rows_seen(config, tokens)
        width = 2 * shape.num_attention_heads * shape.head_dim // t * size
        layers = 1 if p.recompute == "full" else in_flight * chunk
        items.append(
            Item(
                name="keys of prompts",
                num_bytes=layers * seen * width,
                why=f"{seen} rows of keys and values, a prompt's beside each of its answers, x {layers} layers",
            )
        )
    ffn = shape.ffn_hidden_size // t
    if shape.num_experts:
        ffn = shape.moe_ffn_hidden_size * shape.num_experts_per_token // (t if p.sequence_parallel else 1)
    working = tokens * (shape.hidden_size + 3 * ffn) * size + held.largest * size
    working += tokens * layer.recomputed(p.recompute)
    items.append(
        Item(name="one backward", num_bytes=working, why="gradients inside one layer, one weight's gradient, recompute")
    )
    if stage == p.pipeline_parallel - 1:
        columns = padded_vocab_size(shape.vocab_size, t, shape.vocab_multiple) // t
        s = t if p.sequence_parallel else 1
        # logits exist one block of rows at a time, in float32 (mcore/head.py); rows without loss are not projected
        block = min(tokens * columns * _FP32, _LOGITS_BLOCK_CPU if hardware.is_cpu else _LOGITS_BLOCK)
        hidden = shape.hidden_size * size * (1 + 3 // s if s > 1 else 3)
        items.append(
            Item(
                name="head",
                num_bytes=block + tokens * (hidden + 3 * _FP32),
                why=f"a block of at most {tokens} x {columns} float32 logits, hidden states",
            )
        )
    return tuple(items)


def _tokens_per_rank(config: RestConfig, world_size: int) -> int:
    """Of the longest microbatch, on one context-parallel rank, padding included: as long as it may be, unless an update
    has too few sequences to fill the least number of them.
    """
    p = config.parallel
    dp, sequences = p.data_parallel(world_size), _sequences(config)
    least = min(least_microbatches(p), -(-sequences // dp))
    multiple = microbatches_multiple(p)
    bins = dp * (-(-least // multiple) * multiple)
    tokens = min(config.trainer.max_tokens_per_microbatch, -(-sequences // bins) * _longest(config))
    alignment = packing_alignment(config.precision.recipe, p).total
    return -(-tokens // alignment) * alignment // p.context_parallel


def _rows_seen(config: RestConfig, tokens: int) -> int:
    """Keys that the answers of a microbatch of ``tokens`` rows attend to, if all sequences are longest."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    siblings = min(config.rollout.rollouts_per_prompt, max((tokens - prompt) // response, 1))
    return tokens * siblings * (prompt + response) // (prompt + siblings * response) if siblings > 1 else 0


def _sequences(config: RestConfig) -> int:
    """Of one update, over all replicas."""
    return config.data.prompts_per_step * config.rollout.rollouts_per_prompt // config.optimizer.updates_per_step


def _longest(config: RestConfig) -> int:
    """Tokens of the longest sequence."""
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def _chunks_in_flight(config: RestConfig, stage: int, world_size: int) -> int:
    """Forward passes of model chunks whose backward pass is still to come: Megatron's 1F1B, plain or interleaved."""
    p = config.parallel
    pp, vpp = p.pipeline_parallel, p.virtual_pipeline
    most = _num_microbatches(config, world_size=world_size) * vpp
    warm_up = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    return min(warm_up + 1, most)


def engine_memory(config: RestConfig, shape: ModelShape, hardware: Hardware) -> tuple[Item, ...]:
    """What vLLM takes of a GPU's memory: the policy's too if engines are colocated, else one of its own."""
    r = config.rollout
    weights = engine_weight_bytes(config, shape) // r.tensor_parallel
    held = r.dtype if r.quantization is RolloutQuantization.NONE else f"{r.dtype}, {r.quantization}"
    if hardware.is_cpu:
        return (
            Item(name="engine: weights", num_bytes=weights, why=held),
            Item(name="engine: KV cache", num_bytes=r.kv_cache_bytes, why="rollout.kv_cache_bytes"),
        )
    share = int(r.gpu_memory_utilization * hardware.memory)
    kv = max(share - weights - _engine_work(config, shape), 0)
    return (
        Item(name="engine: weights", num_bytes=weights, why=f"{held} / rollout.tensor_parallel {r.tensor_parallel}"),
        Item(
            name="engine: KV cache",
            num_bytes=kv,
            why=f"what rollout.gpu_memory_utilization {r.gpu_memory_utilization} leaves: "
            f"{kv // kv_bytes_per_token(config, shape):,} tokens",
        ),
        Item(name="engine: activations", num_bytes=_engine_work(config, shape), why="prefill of 8,192 tokens, logits"),
    )


def engine_weight_bytes(config: RestConfig, shape: ModelShape, *, active_only: bool = False) -> int:
    """One engine's copy of the weights; ``active_only`` counts the experts that one token visits.

    With ``rollout.quantization`` a matrix of a layer takes a byte an element and 4 bytes a scale (a row's length is
    taken for the hidden size); embedding, output layer, norms and routers keep ``rollout.dtype``.
    """
    r = config.rollout
    size = itemsize(r.dtype)
    total = total_parameters(shape, active_only=active_only) * size
    if r.quantization is RolloutQuantization.NONE:
        return total
    kept = shape.vocab_size * (1 if shape.tied_embeddings else 2)
    kept += shape.num_experts * (shape.num_layers - len(shape.dense_layers))
    matrices = total_parameters(shape, active_only=active_only, matrices_only=True) - kept * shape.hidden_size
    shared = 128 * 128 if r.quantization is RolloutQuantization.FP8_BLOCK else shape.hidden_size
    return total - matrices * (size - 1) + 4 * matrices // shared


def _engine_work(config: RestConfig, shape: ModelShape) -> int:
    """vLLM profiles one pass over its token budget (8,192) and float32 logits of every running sequence."""
    t = config.rollout.tensor_parallel
    size = itemsize(config.rollout.dtype)
    width = max(shape.ffn_hidden_size, shape.moe_ffn_hidden_size * shape.num_experts_per_token)
    return 8192 * (2 * shape.hidden_size + 3 * width // t) * size + config.rollout.max_concurrent * shape.vocab_size * 8


def _syncing(config: RestConfig, shape: ModelShape, held: StageParameters) -> tuple[Item, ...]:
    """A bucket as gathered, what was made of it, and this rank's part of it; or the messages of slices under way."""
    if config.weight_sync.transport != "local":
        message = min(config.weight_sync.bucket_bytes, PACKED_BYTES)
        num_bytes = MESSAGES_UNDER_WAY * message
        why = f"{MESSAGES_UNDER_WAY} packed messages of slices under way, {message >> 20} MiB each"
        if config.rollout.quantization is not RolloutQuantization.NONE:
            num_bytes, why = num_bytes + held.layer_matrices, f"{why}; this rank's matrices in FP8"
        return (Item(name="sync buffers", num_bytes=num_bytes, why=why),)
    size = itemsize(config.model.dtype)
    largest = max(sum(math.prod(d) for d in hf_shapes(spec, shape)) for spec in parameter_map(shape)) * size
    bucket = max(config.weight_sync.bucket_bytes, largest)
    what = "the largest tensor" if largest > config.weight_sync.bucket_bytes else "weight_sync.bucket_bytes"
    num_bytes = 2 * bucket + bucket // config.parallel.tensor_parallel
    return (Item(name="sync buffers", num_bytes=num_bytes, why=f"{what}: gathered, as tensors, this rank's part"),)


def _sum(items: tuple[Item, ...]) -> int:
    return sum(item.num_bytes for item in items)
