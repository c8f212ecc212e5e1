"""Seconds of one RL step, from its operations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_rest.config import Fp8Recipe, RestConfig
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.hardware import EFFICIENCY, Efficiency, Hardware
from megatron_rest.planner.lengths import Lengths
from megatron_rest.planner.memory import (
    engine_memory,
    engine_weight_bytes,
    itemsize,
    kv_bytes_per_token,
    offloaded_bytes,
)
from megatron_rest.planner.parameters import count_stages
from megatron_rest.planner.work import StepWork, extra_draws, forward_flops

__all__ = ["StepTime", "step_time", "training_seconds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of the phases of a step."""

    rollout: float
    score: float
    update: float
    between: float = 0.0  # neither of these: data, engines that sleep and wake, weights, trainer.offload
    is_overlapped: bool = False  # the next step's rollouts run while this one trains

    @property
    def total(self) -> float:
        training = self.score + self.update
        return (max(self.rollout, training) if self.is_overlapped else self.rollout + training) + self.between


def step_time(
    config: RestConfig,
    shape: ModelShape,
    hardware: Hardware,
    work: StepWork,
    *,
    world_size: int,
    lengths: Lengths,
    zero_groups: float = 0.0,
    efficiency: Efficiency = EFFICIENCY,
) -> StepTime | None:
    """None on CPU: what an operation costs there depends on everything else that runs."""
    seconds = training_seconds(config, shape, hardware, work, world_size=world_size, efficiency=efficiency)
    if seconds is None:
        return None
    rollout = _rollout_time(config, shape, hardware, world_size=world_size, lengths=lengths, efficiency=efficiency)
    time = StepTime(
        rollout=rollout * (1 + extra_draws(config, zero_groups)),
        score=seconds[0],
        update=seconds[1],
        is_overlapped=config.rollout.max_staleness > 0,
    )
    between = efficiency.between / (1 - efficiency.between) * time.total
    if config.trainer.offload:  # there and back
        between += 2 * offloaded_bytes(config, shape, world_size=world_size) / (hardware.host * efficiency.links)
    return replace(time, between=between)


def training_seconds(
    config: RestConfig,
    shape: ModelShape,
    hardware: Hardware,
    work: StepWork,
    *,
    world_size: int,
    efficiency: Efficiency = EFFICIENCY,
) -> tuple[float, float] | None:
    """Of scoring and updates; None on CPU.

    Operations over a share of the peak, by kind (dense or with experts, BF16 or FP8), and what the links carry beside
    them: TP's exchanges of rows, unless they are overlapped, the rows' ways to their experts, hidden states between
    stages, keys and values between CP ranks, and once an update gradients and parameters between replicas.
    """
    if hardware.is_cpu:
        return None
    e = efficiency
    if shape.num_experts:
        training = scoring = hardware.bf16_flops * e.experts
    else:
        peak = hardware.fp8_flops if config.precision.recipe is not Fp8Recipe.NONE else hardware.bf16_flops
        training, scoring = peak * e.training, peak * e.scoring
    # An update computes three passes forward, and sends what one sends twice: there and back.
    a_pass = _pass_seconds(config, shape, hardware, work, world_size, e)
    update = work.update / training + work.num_updates * (work.update_passes - 1) * a_pass
    update += work.num_updates * _reduction_seconds(config, shape, hardware, world_size, e)
    return work.score / scoring + work.score_passes * a_pass, update


def _pass_seconds(
    config: RestConfig, shape: ModelShape, hardware: Hardware, work: StepWork, world_size: int, e: Efficiency
) -> float:
    """What the links of the busiest GPU carry in the forward pass of an update, and nothing hides."""
    p, size = config.parallel, itemsize(config.model.dtype)
    t, c, stages = p.tensor_parallel, p.context_parallel, p.pipeline_parallel
    near, far = hardware.nvlink * e.links, hardware.nic * e.links
    unit = forward_flops(shape, tokens=1, mean_context=0, head=False)
    rows = work.forward * t * stages / unit  # that a GPU's layers see, with its TP ranks
    layers, row = shape.num_layers / stages, shape.hidden_size * size
    seconds = 0.0
    if t > 1:
        link = near if t <= hardware.gpus_per_node else far
        seconds += e.tp_exposed * rows * layers * 4 * row * (t - 1) / t / link  # 2 gathers and 2 reductions a layer
    if shape.num_experts:
        share = 1 - len(shape.dense_layers) / shape.num_layers
        moves = e.expert_moves * shape.num_experts_per_token * row / hardware.nvlink
        seconds += rows / t * layers * share * moves
    if stages > 1:
        link = near if world_size <= hardware.gpus_per_node else far
        seconds += rows * p.virtual_pipeline * row / (t if p.sequence_parallel else 1) / link
    if c > 1:
        link = near if t * c <= hardware.gpus_per_node else far
        keys = 2 * shape.num_query_groups * shape.head_dim * size / t
        seconds += rows * layers * (c - 1) * keys / link
    return seconds


def _reduction_seconds(
    config: RestConfig, shape: ModelShape, hardware: Hardware, world_size: int, e: Efficiency
) -> float:
    """Gradients and parameters between the replicas once an update: those that do not travel beside the computation."""
    ddp = config.megatron.ddp
    # A float32 gradient there, a parameter back.
    bytes_of_one = 0 if ddp.get("overlap_grad_reduce", False) else 4
    bytes_of_one += 0 if ddp.get("overlap_param_gather", False) else itemsize(config.model.dtype)
    p = config.parallel
    link = (hardware.nvlink if world_size <= hardware.gpus_per_node else hardware.nic) * e.links
    replicas = p.data_parallel(world_size) * p.context_parallel
    of_experts = max(replicas * p.tensor_parallel // p.expert_parallel, 1)
    return max(
        bytes_of_one * (s.dense * (1 - 1 / replicas) + s.experts * (1 - 1 / of_experts)) / link
        for s in count_stages(shape, p)
    )


def _rollout_time(
    config: RestConfig, shape: ModelShape, hardware: Hardware, *, world_size: int, lengths: Lengths,
    efficiency: Efficiency,
) -> float:  # fmt: skip
    """Prefill once a prompt (its siblings share the prefix), then decode steps that read weights and cache once each.

    As many steps as the longest response has tokens, or more where not all sequences run at once.
    """
    r = config.rollout
    replicas = r.replicas or max(world_size // r.tensor_parallel, 1)
    prompts = config.data.prompts_per_step / replicas
    sequences = prompts * r.rollouts_per_prompt
    group = r.tensor_parallel
    prefill = forward_flops(shape, tokens=prompts * lengths.prompt, mean_context=lengths.prompt / 2, head=False)
    context = lengths.prompt + lengths.response / 2
    cache = next(item.num_bytes for item in engine_memory(config, shape, hardware) if item.name == "engine: KV cache")
    running = max(min(sequences, r.max_concurrent, cache / (context * kv_bytes_per_token(config, shape))), 1.0)
    steps = math.ceil(max(r.max_response_tokens, sequences * lengths.response / running))
    on_average = max(sequences * lengths.response / steps, 1.0)  # short answers end before the last step
    few = shape.num_experts > on_average * shape.num_experts_per_token
    weights = engine_weight_bytes(config, shape, active_only=few)
    read = weights / group + on_average * context * kv_bytes_per_token(config, shape)
    compute = forward_flops(shape, tokens=on_average, mean_context=context) / (group * hardware.bf16_flops)
    share = efficiency.decode_experts if shape.num_experts else efficiency.decode_bandwidth
    one = max(read / (hardware.memory_bandwidth * share), compute / efficiency.prefill) + efficiency.decode_step
    if group > 1:
        wait = efficiency.all_reduce if group <= hardware.gpus_per_node else efficiency.all_reduce_far
        one += 2 * shape.num_layers * wait
    return prefill / (group * hardware.bf16_flops * efficiency.prefill) + steps * one
