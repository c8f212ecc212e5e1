"""Floating-point operations of one RL step, and seconds from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rest.config import Fp8Recipe, RestConfig
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.hardware import EFFICIENCY, Efficiency, Hardware
from megatron_rest.planner.memory import (
    engine_memory,
    engine_weight_bytes,
    kv_bytes_per_token,
    num_microbatches,
)
from megatron_rest.planner.parameters import total_parameters

__all__ = ["Lengths", "StepTime", "forward_flops", "step_time"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Mean tokens of a prompt and of a response; not known before a run, so half of the limits unless given."""

    prompt: float
    response: float

    @classmethod
    def of(cls, config: RestConfig, *, prompt: float = 0, response: float = 0) -> Lengths:
        return cls(
            prompt=prompt or config.data.max_prompt_tokens / 2,
            response=response or config.rollout.max_response_tokens / 2,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of the phases of a step."""

    rollout: float
    score: float
    update: float
    train_flops: float  # scoring and update, whole job
    bubble: float  # share of the pipeline's time that is idle
    num_microbatches: int
    is_overlapped: bool = False  # the next step's rollouts run while this one trains

    @property
    def total(self) -> float:
        training = self.score + self.update
        return max(self.rollout, training) if self.is_overlapped else self.rollout + training


def forward_flops(shape: ModelShape, *, tokens: float, mean_context: float, head: bool = True) -> float:
    """Of one forward pass: 2 per weight and token that a token meets, and 4 q per token and token it attends to.

    The input embedding is a look-up; normalisation, rotation and SwiGLU's elementwise part are left out (below 1 %).
    """
    embedding = shape.vocab_size * shape.hidden_size
    matrices = total_parameters(shape, active_only=True, matrices_only=True)
    matrices -= embedding if shape.tied_embeddings else 2 * embedding
    attention = 4 * shape.num_layers * shape.num_attention_heads * shape.head_dim * mean_context
    return tokens * (2 * (matrices + (embedding if head else 0)) + attention)


def step_time(
    config: RestConfig,
    shape: ModelShape,
    hardware: Hardware,
    *,
    world_size: int,
    lengths: Lengths,
    efficiency: Efficiency = EFFICIENCY,
) -> StepTime | None:
    """None on CPU: what an operation costs there depends on everything else that runs."""
    if hardware.is_cpu:
        return None
    p = config.parallel
    sequences = config.data.prompts_per_step * config.rollout.rollouts_per_prompt
    mean = lengths.prompt + lengths.response
    forward = forward_flops(shape, tokens=sequences * mean, mean_context=mean / 2)
    again = {"none": 0.0, "mlp": _mlp_share(shape), "full": 1.0}[p.recompute]
    update = forward * (3 + again)
    peak = hardware.fp8_flops if config.precision.recipe is not Fp8Recipe.NONE else hardware.bf16_flops
    microbatches = num_microbatches(config, world_size=world_size, mean_tokens=mean)
    idle = (p.pipeline_parallel - 1) / (p.virtual_pipeline * microbatches)
    return StepTime(
        rollout=_rollout_time(config, shape, hardware, world_size=world_size, lengths=lengths, efficiency=efficiency),
        score=forward / (world_size * peak * efficiency.scoring) * (1 + idle),
        update=update / (world_size * peak * efficiency.training) * (1 + idle),
        train_flops=forward + update,
        bubble=idle / (1 + idle),
        num_microbatches=microbatches,
        is_overlapped=config.rollout.max_staleness > 0,
    )


def _mlp_share(shape: ModelShape) -> float:
    """Of a forward pass, by weights."""
    width = shape.moe_ffn_hidden_size * shape.num_experts_per_token if shape.num_experts else shape.ffn_hidden_size
    return 3 * shape.hidden_size * width * shape.num_layers / total_parameters(shape, active_only=True)


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
