"""What a sharded policy holds, as full Hugging Face tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rest.model_map import expert_owner, parameter_map, to_hf
from megatron_rest.trainer.setup import PolicyParts


def full_parameters(parts: PolicyParts) -> dict[str, np.ndarray]:
    """HF name -> parameter, on rank 0 ({} elsewhere).  Collective; see :func:`_assemble`."""
    return _assemble(parts, {name: shard.cpu() for name, shard in parts.policy.named_shards().items()})


def full_gradient(parts: PolicyParts) -> dict[str, np.ndarray]:
    """HF name -> gradient of the last update, as the optimiser saw it, on rank 0 ({} elsewhere).  Collective."""
    optimizer = parts.policy.optimizer
    return _assemble(parts, {name: _own_part(optimizer, p).cpu() for name, p in parts.policy.named_parameters()})


def _assemble(parts: PolicyParts, mine: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """All ranks' shards put together.

    Experts must lie where ``model_map`` says, and copies (TP and data-parallel replicas, tied embeddings) must hold the
    same bits, where a rank knows them: NaN is what it does not know.
    """
    context = parts.context
    everybody: list[Any] = [None] * context.world_size
    dist.gather_object((context.tp_rank, context.ep_rank, mine), everybody if context.rank == 0 else None)
    full: dict[str, np.ndarray] = {}
    for spec in parameter_map(parts.shape) if context.rank == 0 else ():
        names = (spec.megatron_name, *spec.alternatives, *spec.tied_copies)
        held = [(tp, ep, shards[name]) for tp, ep, shards in everybody for name in names if name in shards]
        if spec.expert is not None:
            owner = expert_owner(spec.expert, parts.shape.num_experts, context.ep_size)
            assert {ep for _, ep, _ in held} == {owner}, spec.megatron_name
        by_tp_rank = [
            [x for tp, _, x in held if tp == rank or spec.shard_dim is None] for rank in range(context.tp_size)
        ]
        whole = [_merged(spec.megatron_name, copies) for copies in by_tp_rank]
        full |= {name: value.numpy() for name, value in to_hf(spec, whole, shape=parts.shape).items()}
    return full


def _own_part(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """``main_grad``; NaN where a distributed optimiser has left the reduced values to another replica."""
    gradient = parameter.main_grad.detach().clone()
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if not hasattr(parts[0], "model_param_gbuf_map"):
        return gradient
    known = torch.full_like(gradient, torch.nan)
    for part in parts:
        if parameter in part.model_param_gbuf_map:
            own = part._get_model_param_range_map(parameter)["param"]
            known.view(-1)[own.start : own.end] = gradient.view(-1)[own.start : own.end]
    return known


def _merged(name: str, copies: list[torch.Tensor]) -> torch.Tensor:
    whole = copies[0].clone()
    for copy in copies[1:]:
        both = ~(whole.isnan() | copy.isnan())
        assert torch.equal(whole[both], copy[both]), f"copies of {name} differ"
        whole = torch.where(whole.isnan(), copy, whole)
    assert not whole.isnan().any(), f"nobody knows all of {name}"
    return whole
