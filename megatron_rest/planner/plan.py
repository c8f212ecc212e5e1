"""Memory, time and problems of one configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rest.config import RestConfig, validate
from megatron_rest.engine_gpus import why_not
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.hardware import Hardware
from megatron_rest.planner.memory import Item, StageMemory, engine_memory, kv_bytes_per_token, stage_memories
from megatron_rest.planner.shapes import find_shape
from megatron_rest.planner.steptime import Lengths, StepTime, step_time
from megatron_rest.planner.synctime import SyncTime, sync_time

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a configuration needs on ``world_size`` accelerators."""

    config: RestConfig
    shape: ModelShape
    shape_source: str
    hardware: Hardware
    world_size: int
    lengths: Lengths
    stages: tuple[StageMemory, ...]
    engine: tuple[Item, ...]
    time: StepTime | None
    sync: SyncTime | None
    problems: tuple[str, ...]

    @property
    def num_engine_gpus(self) -> int:
        """GPUs of engines that have their own."""
        return self.config.rollout.replicas * self.config.rollout.tensor_parallel

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.peak for stage in self.stages)

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def limit(self) -> int:
        """Bytes a rank may use: a GPU's, or an equal part of this machine's."""
        return self.hardware.memory // self.world_size if self.hardware.is_cpu else self.hardware.memory

    @property
    def fits(self) -> bool:
        return not self.problems

    def variant(self, config: RestConfig, *, world_size: int = 0) -> Plan:
        """The same for another configuration of the same model."""
        return _plan(replace(self, config=config, world_size=world_size or self.world_size))


def make_plan(
    config: RestConfig, hardware: Hardware, *, world_size: int, mean_prompt: float = 0, mean_response: float = 0
) -> Plan:
    """Raises :class:`ConfigError` for a configuration that cannot run, or a model whose numbers are not known."""
    shape, source = find_shape(config.model.path, config.model.shape)
    lengths = Lengths.of(config, prompt=mean_prompt, response=mean_response)
    draft = Plan(
        config=config, shape=shape, shape_source=source, hardware=hardware, world_size=world_size, lengths=lengths,
        stages=(), engine=(), time=None, sync=None, problems=(),
    )  # fmt: skip
    return _plan(draft)


def _plan(draft: Plan) -> Plan:
    validate(draft.config, world_size=draft.world_size)
    stages = stage_memories(draft.config, draft.shape, draft.hardware, world_size=draft.world_size)
    time = step_time(draft.config, draft.shape, draft.hardware, world_size=draft.world_size, lengths=draft.lengths)
    plan = replace(
        draft,
        stages=tuple(stages),
        engine=engine_memory(draft.config, draft.shape, draft.hardware),
        time=time,
        sync=sync_time(draft.config, draft.shape, draft.hardware, world_size=draft.world_size),
        problems=(),
    )
    return replace(plan, problems=tuple(_problems(plan)))


def _problems(plan: Plan) -> list[str]:
    found = []
    if plan.peak > plan.limit:
        found.append(
            f"stage {plan.fullest.stage} needs {plan.peak / 1e9:.1f} GB a rank, {plan.limit / 1e9:.1f} GB are there"
        )
    cache = next(item.num_bytes for item in plan.engine if item.name == "engine: KV cache")
    one = plan.config.model.max_sequence_length * kv_bytes_per_token(plan.config, plan.shape)
    if cache < one:
        found.append(
            f"the engine's KV cache of {cache / 1e9:.2f} GB holds not one sequence of "
            f"{plan.config.model.max_sequence_length} tokens ({one / 1e9:.2f} GB): raise "
            f"{'rollout.kv_cache_bytes' if plan.hardware.is_cpu else 'rollout.gpu_memory_utilization'} or "
            "rollout.tensor_parallel"
        )
    if not plan.hardware.is_cpu:
        gpus = plan.hardware.gpus_per_node
        ranks = min(gpus, plan.world_size)
        fault = why_not(plan.config, world_size=plan.world_size, ranks_per_node=ranks, gpus_per_node=gpus)
        if fault:
            found.append(fault)
    return found
