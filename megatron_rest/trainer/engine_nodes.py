"""Engines on nodes of their own (``rollout.nodes``): which nodes there are, and which engine goes where."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_rest.config import ConfigError, RestConfig, RolloutConfig
from megatron_rest.rollout.host import EngineHost, announced

__all__ = ["find_hosts", "hosted_place"]

ENGINES_DIR = "engines"
_POLL_SECONDS = 1.0


def find_hosts(config: RestConfig, rank: int) -> list[EngineHost]:
    """The hosts that wait in ``<run_dir>/engines``; none if ``rollout.nodes`` is 0.

    Collectives: one broadcast from rank 0, which waits up to ``rollout.engine_timeout_seconds`` for all of them.
    Raises ConfigError on every rank if some do not come.
    """
    wanted = config.rollout.nodes
    if not wanted:
        return []
    folder = Path(config.trainer.run_dir) / ENGINES_DIR
    found: list[list[EngineHost]] = [[]]
    if rank == 0:
        deadline = time.monotonic() + config.rollout.engine_timeout_seconds
        while len(found[0]) < wanted and time.monotonic() < deadline:
            found[0] = announced(folder)
            time.sleep(_POLL_SECONDS if len(found[0]) < wanted else 0)
    dist.broadcast_object_list(found, src=0)
    if len(found[0]) < wanted:
        raise ConfigError(
            f"rollout.nodes is {wanted}, and {len(found[0])} announced themselves in {folder} within "
            f"{config.rollout.engine_timeout_seconds:g} s: start python -m megatron_rest.rollout.host {folder} on "
            "each, or set rollout.nodes=0"
        )
    return found[0][:wanted]


def hosted_place(config: RolloutConfig, hosts: Sequence[EngineHost], index: int) -> tuple[EngineHost, str | None]:
    """Host of engine ``index`` and its GPUs there, as for CUDA_VISIBLE_DEVICES (None: a host without GPUs)."""
    per_host = config.replicas // len(hosts)
    host, slot = hosts[index // per_host], index % per_host
    if not host.num_gpus:
        return host, None
    first, last = slot * config.tensor_parallel, (slot + 1) * config.tensor_parallel
    if last > host.num_gpus:
        raise ConfigError(
            f"rollout.replicas {config.replicas} x rollout.tensor_parallel {config.tensor_parallel} on rollout.nodes "
            f"{config.nodes}: {per_host} engines want {per_host * config.tensor_parallel} GPUs of {host.address}, "
            f"which has {host.num_gpus}"
        )
    return host, ",".join(str(gpu) for gpu in range(first, last))
