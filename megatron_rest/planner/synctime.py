"""Time of a weight transfer: the least, from the bytes each side must move and the slower of the links they cross; and
for engines of their own as simulated with the plans that ranks would make.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rest.config import RestConfig
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.hardware import EFFICIENCY, Efficiency, Hardware
from megatron_rest.planner.memory import engine_weight_bytes, itemsize
from megatron_rest.weight_sync.limits import Links, SyncSetting, sync_limits

__all__ = ["SyncTime", "simulated", "sync_time"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncTime:
    """Seconds of one transfer on data-sheet links, and of what the trainer does today."""

    copy_bytes: int  # one whole copy of the weights
    limit: float  # every GPU receives only what it lacks
    gather: float  # every GPU receives every tensor, as weight_sync/source.py sends them
    simulated: float | None = None  # with windows, order and hosts of the real plans (weight_sync/timing.py)


def sync_time(
    config: RestConfig, shape: ModelShape, hardware: Hardware, *, world_size: int, efficiency: Efficiency = EFFICIENCY
) -> SyncTime | None:
    """Engines of their own: every copy leaves the training GPUs and enters an engine's, over the network.

    Colocated engines: a GPU needs ``1 / rollout.tensor_parallel`` of a copy and holds some of it already.

    The limit counts at least reading and writing that share once in GPU memory.  Between pipeline stages bytes cross
    the network (a stage is a node or more), inside one they cross NVLink.
    """
    if hardware.is_cpu:
        return None
    p = config.parallel
    size = engine_weight_bytes(config, shape)
    if config.rollout.replicas:
        setting = SyncSetting(
            num_parameters=size / itemsize(config.rollout.dtype),  # as many bytes
            train_gpus=world_size,
            engine_gpus=config.rollout.tensor_parallel,
            replicas=config.rollout.replicas,
            dtype=config.rollout.dtype,
        )
        limits = sync_limits(setting, Links(nic=hardware.nic, nvlink=hardware.nvlink, hbm=hardware.memory_bandwidth))
        return SyncTime(copy_bytes=size, limit=limits.slices, gather=limits.broadcast / efficiency.links)
    share = size / config.rollout.tensor_parallel
    away = 1 - 1 / p.pipeline_parallel  # of what is needed lies on another stage
    beside = (1 - away) * (1 - 1 / p.tensor_parallel)
    crosses_nodes = p.tensor_parallel * p.pipeline_parallel > hardware.gpus_per_node
    far = hardware.nic if crosses_nodes else hardware.nvlink
    limit = max(share * away / far, share * beside / hardware.nvlink, 2 * share / hardware.memory_bandwidth)
    gather = size * away / (far * efficiency.links) + size * beside / (hardware.nvlink * efficiency.links)
    return SyncTime(copy_bytes=size, limit=limit, gather=gather)


def simulated(time: SyncTime, config: RestConfig, shape: ModelShape, *, world_size: int) -> SyncTime:
    """With its simulation (a second or some of CPU time): of engines of their own, where torch is installed."""
    if not config.rollout.replicas:
        return time
    try:
        from megatron_rest.weight_sync.timing import simulate_push
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return time
    return replace(time, simulated=simulate_push(config, shape, world_size=world_size).seconds)
