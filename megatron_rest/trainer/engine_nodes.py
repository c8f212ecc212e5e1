"""Engines on nodes of their own (``rollout.nodes``): which nodes there are, and which engine goes where."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rest.config import ConfigError, RestConfig, RolloutConfig
from megatron_rest.rollout.host import EngineHost, announced

__all__ = ["find_hosts", "hosted_place"]

ENGINES_DIR = "engines"
_POLL_SECONDS = 1.0
_SAY_SECONDS = 30.0


def find_hosts(config: RestConfig, rank: int) -> list[EngineHost]:
    """The hosts that wait in ``<run_dir>/engines``; none if ``rollout.nodes`` is 0.

    Collectives: one broadcast from rank 0, which waits up to ``rollout.engine_timeout_seconds`` for all of them.
    Raises ConfigError on every rank if some do not come.
    """
    wanted = config.rollout.nodes
    if not wanted:
        return []
    folder = Path(config.trainer.run_dir) / ENGINES_DIR
    found: list[Any] = [[], []]
    if rank == 0:
        found = list(_wait_for(folder, wanted, config.rollout.engine_timeout_seconds))
    dist.broadcast_object_list(found, src=0)
    hosts, silent = found
    if len(hosts) < wanted:
        unreachable = f" ({'; '.join(silent)})" if silent else ""
        raise ConfigError(
            f"rollout.nodes is {wanted}, and {len(hosts)} can be reached as {folder} says after "
            f"{config.rollout.engine_timeout_seconds:g} s{unreachable}: start python -m megatron_rest.rollout.host "
            f"{folder} on each (logs/engines-N.log says what became of it), or set rollout.nodes=0"
        )
    return list(hosts[:wanted])


def _wait_for(folder: Path, wanted: int, seconds: float) -> tuple[list[EngineHost], list[str]]:
    """Hosts that answer, and why others that have left their address do not; a line a minute says who is missing."""
    started = said = time.monotonic()
    while True:
        silent: list[str] = []
        hosts = announced(folder, silent)
        now = time.monotonic()
        if len(hosts) >= wanted or now - started > seconds:
            return hosts, silent
        if now - said > _SAY_SECONDS:
            said = now
            print(f"waiting for nodes of engines: {len(hosts)} of {wanted} are there", file=sys.stderr, flush=True)
        time.sleep(_POLL_SECONDS)


def hosted_place(config: RolloutConfig, hosts: Sequence[EngineHost], index: int) -> tuple[EngineHost, str | None]:
    """Host of engine ``index`` and its GPUs, by their numbers among those the host sees (None: it has none)."""
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
