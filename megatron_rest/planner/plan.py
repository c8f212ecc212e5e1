"""Memory, time and problems of one configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rest.config import RestConfig, validate
from megatron_rest.engine_gpus import why_not
from megatron_rest.model_fit import check_model
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.hardware import Hardware
from megatron_rest.planner.lengths import Lengths
from megatron_rest.planner.memory import Item, StageMemory, engine_memory, kv_bytes_per_token, stage_memories
from megatron_rest.planner.shapes import find_shape
from megatron_rest.planner.steptime import StepTime, step_time, training_seconds
from megatron_rest.planner.synctime import SyncTime, simulated, sync_time
from megatron_rest.planner.work import Assumptions, StepWork, step_work

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
    work: StepWork
    time: StepTime | None
    sync: SyncTime | None
    problems: tuple[str, ...]
    zero_groups: float = 0.0  # share of groups whose rewards are all alike

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
        return _plan(
            config, self.shape, self.shape_source, self.hardware, world_size or self.world_size, self.lengths,
            self.zero_groups,
        )  # fmt: skip

    def with_simulated_sync(self) -> Plan:
        """The same with the weight transfer simulated, event by event, where engines have GPUs of their own."""
        if self.sync is None:
            return self
        return replace(self, sync=simulated(self.sync, self.config, self.shape, world_size=self.world_size))

    @property
    def assumed(self) -> Assumptions:
        return Assumptions.of(self.config, is_cpu=self.hardware.is_cpu, zero_groups=self.zero_groups)

    def work_under(self, assumed: Assumptions) -> StepWork:
        """Of the same step with other things left out."""
        return step_work(self.config, self.shape, world_size=self.world_size, lengths=self.lengths, assumed=assumed)

    def training_cost(self, work: StepWork) -> float:
        """Scoring and updates: seconds, or on CPU operations of the rank that has most to do."""
        seconds = training_seconds(self.config, self.shape, self.hardware, work, world_size=self.world_size)
        return sum(seconds) if seconds else work.score + work.update


def make_plan(
    config: RestConfig,
    hardware: Hardware,
    *,
    world_size: int,
    mean_prompt: float = 0,
    mean_response: float = 0,
    zero_groups: float = 0.0,
) -> Plan:
    """``mean_prompt`` and ``mean_response`` in tokens; 0: as ``planner.lengths`` finds them.

    Raises :class:`ConfigError` for a configuration that cannot run, or a model whose numbers are not known.
    """
    validate(config, world_size=world_size)
    shape, source = find_shape(config.model.path, config.model.shape)
    lengths = Lengths.of(config, prompt=mean_prompt, response=mean_response)
    return _plan(config, shape, source, hardware, world_size, lengths, zero_groups)


def _plan(
    config: RestConfig, shape: ModelShape, source: str, hardware: Hardware, world_size: int, lengths: Lengths,
    zero_groups: float,
) -> Plan:  # fmt: skip
    validate(config, world_size=world_size)
    check_model(shape, config)
    stages = stage_memories(config, shape, hardware, world_size=world_size)
    assumed = Assumptions.of(config, is_cpu=hardware.is_cpu, zero_groups=zero_groups)
    work = step_work(config, shape, world_size=world_size, lengths=lengths, assumed=assumed)
    time = step_time(config, shape, hardware, work, world_size=world_size, lengths=lengths, zero_groups=zero_groups)
    plan = Plan(
        config=config,
        shape=shape,
        shape_source=source,
        hardware=hardware,
        world_size=world_size,
        lengths=lengths,
        stages=tuple(stages),
        engine=engine_memory(config, shape, hardware),
        work=work,
        time=time,
        sync=sync_time(config, shape, hardware, world_size=world_size),
        problems=(),
        zero_groups=zero_groups,
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
