"""Process groups that a rank makes when a job starts, and whom it connects to.

Megatron's own code makes them, as one rank of many on torch's fake process group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_rest.config import RestConfig
from megatron_rest.mcore.dry import as_rank

__all__ = ["Start", "simulate_start"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Of one rank."""

    made: int  # calls of torch.distributed.new_group that this rank takes part in
    sockets: int  # connections of its groups, all members of each counted when they connect on demand only if they talk
    members: tuple[int, ...]  # ranks of each of its groups, the default one first


def simulate_start(config: RestConfig, *, rank: int, world_size: int) -> Start:
    """The process must have no process group yet; it has the fake one afterwards."""
    members: list[int] = [world_size]
    made = 0
    as_rank(rank, world_size)
    real: Callable[..., Any] = dist.new_group

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        group = real(*args, **(options | {"backend": "fake"}))
        ranks = options.get("ranks") or (args[0] if args else None)
        if ranks is None or rank in ranks:
            members.append(world_size if ranks is None else len(ranks))
        return group

    dist.new_group = counted
    try:
        from megatron_rest.mcore.build import initialize

        initialize(config)
    finally:
        dist.new_group = real
    return Start(made=made, sockets=sum(map(_connections, members)), members=tuple(members))


def _connections(size: int) -> int:
    """Peers that a rank of a gloo group of ``size`` talks to in all-reduces, all-gathers and broadcasts.

    gloo's ring and its recursive halving and doubling: two neighbours, and one partner for every power of two.
    """
    return min(size - 1, 2 + (size - 1).bit_length()) if size > 1 else 0
