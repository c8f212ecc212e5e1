"""Whether the GPUs that a job asks for are those that its ranks and engines need, counted before anything starts."""

from __future__ import annotations

from collections import Counter

from megatron_rest.config import RestConfig

__all__ = ["why_not"]


def why_not(config: RestConfig, *, world_size: int, ranks_per_node: int, gpus_per_node: int) -> str:
    """What does not fit and what to change, in one line; empty if everything has a GPU."""
    rollout = config.rollout
    size = rollout.tensor_parallel
    if ranks_per_node > gpus_per_node:
        return f"{ranks_per_node} ranks a node and {gpus_per_node} GPUs: start at most one rank a GPU"
    if not rollout.replicas:
        if ranks_per_node % size:
            return (
                f"rollout.tensor_parallel {size} does not divide the {ranks_per_node} ranks of a node, so that a "
                "colocated engine would span nodes: choose a divisor, or set rollout.replicas"
            )
        return ""
    engines = f"rollout.replicas {rollout.replicas} x rollout.tensor_parallel {size}"
    if size > gpus_per_node:
        return f"rollout.tensor_parallel {size} spans nodes of {gpus_per_node} GPUs: set it to at most {gpus_per_node}"
    if rollout.nodes:
        wanted = rollout.replicas // rollout.nodes * size
        if wanted > gpus_per_node:
            return (
                f"{engines} on rollout.nodes {rollout.nodes} want {wanted} GPUs of each, and a node has "
                f"{gpus_per_node}: set rollout.nodes={_enough(rollout.replicas, size, gpus_per_node)} or fewer replicas"
            )
        return ""
    owners = Counter(i * world_size // rollout.replicas // ranks_per_node for i in range(rollout.replicas))
    most = max(owners.values())
    if ranks_per_node + most * size > gpus_per_node:
        return (
            f"{engines} beside the ranks want {most * size} more GPUs of a node whose {ranks_per_node} of "
            f"{gpus_per_node} GPUs hold ranks: give engines nodes of their own "
            f"(rollout.nodes={_enough(rollout.replicas, size, gpus_per_node)}), or start fewer ranks a node"
        )
    return ""


def _enough(replicas: int, size: int, gpus_per_node: int) -> int:
    """The fewest nodes over which the engines spread evenly and fit."""
    return next(n for n in range(1, replicas + 1) if replicas % n == 0 and replicas // n * size <= gpus_per_node)
