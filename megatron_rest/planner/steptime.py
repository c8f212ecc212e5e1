"""Seconds of one RL step, from its operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rest.config import Fp8Recipe, RestConfig
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.hardware import EFFICIENCY, Efficiency, Hardware
from megatron_rest.planner.lengths import Lengths
from megatron_rest.planner.memory import engine_memory, engine_weight_bytes, kv_bytes_per_token
from megatron_rest.planner.work import StepWork, extra_draws, forward_flops

__all__ = ["StepTime", "step_time", "training_seconds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of the phases of a step."""

    rollout: float
    score: float
    update: float
    is_overlapped: bool = False  # the next step's rollouts run while this one trains

    @property
    def total(self) -> float:
        training = self.score + self.update
        return max(self.rollout, training) if self.is_overlapped else self.rollout + training


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
    seconds = training_seconds(config, hardware, work, efficiency=efficiency)
    if seconds is None:
        return None
    rollout = _rollout_time(config, shape, hardware, world_size=world_size, lengths=lengths, efficiency=efficiency)
    return StepTime(
        rollout=rollout * (1 + extra_draws(config, zero_groups)),
        score=seconds[0],
        update=seconds[1],
        is_overlapped=config.rollout.max_staleness > 0,
    )


def training_seconds(
    config: RestConfig, hardware: Hardware, work: StepWork, *, efficiency: Efficiency = EFFICIENCY
) -> tuple[float, float] | None:
    """Of scoring and updates; None on CPU."""
    if hardware.is_cpu:
        return None
    peak = hardware.fp8_flops if config.precision.recipe is not Fp8Recipe.NONE else hardware.bf16_flops
    return work.score / (peak * efficiency.scoring), work.update / (peak * efficiency.training)


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
    steps = max(r.max_response_tokens, sequences * lengths.response / running)
    few = shape.num_experts > running * shape.num_experts_per_token
    weights = engine_weight_bytes(config, shape, active_only=few)
    read = weights / group + running * context * kv_bytes_per_token(config, shape)
    compute = forward_flops(shape, tokens=running, mean_context=context) / (group * hardware.bf16_flops)
    one = max(read / (hardware.memory_bandwidth * efficiency.decode_bandwidth), compute / efficiency.prefill)
    return prefill / (group * hardware.bf16_flops * efficiency.prefill) + math.ceil(steps) * one
