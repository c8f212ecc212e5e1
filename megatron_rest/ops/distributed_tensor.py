"""DTensors of torch's own parallelisms (torchtitan, ``loss_parallel``, FSDP2): taken where their layout says enough."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

try:
    from torch.distributed.tensor import DTensor, Replicate, Shard
except ImportError:  # torch without distributed, or one that has them elsewhere
    DTensor = None  # type: ignore[assignment, misc]

__all__ = ["local_logits", "refuse_distributed"]


def local_logits(
    logits: Tensor, labels: Tensor, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, dist.ProcessGroup | None]:
    """Local logits, labels, and the group over which a DTensor's last dimension is split; other tensors as they came.

    The gradient comes back as a DTensor of the same layout.

    Raises:
        ValueError: another layout than the last dimension split over one dimension of the mesh and the rest replicated,
            shards of unequal width, or a ``tp_group`` that contradicts it.
    """
    if DTensor is None or not (isinstance(logits, DTensor) or isinstance(labels, DTensor)):
        return logits, labels, tp_group
    if isinstance(labels, DTensor):
        if not all(isinstance(placement, Replicate) for placement in labels.placements):
            raise ValueError(f"labels are a DTensor {labels.placements}: pass labels.full_tensor()")
        labels = labels.to_local()
    if not isinstance(logits, DTensor):
        return logits, labels, tp_group
    last = logits.dim() - 1
    split = [i for i, p in enumerate(logits.placements) if not isinstance(p, Replicate)]
    placements = [logits.placements[i] for i in split]
    if len(split) > 1 or any(not isinstance(p, Shard) or p.dim not in (-1, last) for p in placements):
        raise ValueError(
            f"logits are a DTensor {logits.placements}: only Shard(-1) over one dimension of the mesh is read (what "
            "loss_parallel gives); for any other pass logits.redistribute(...) or the local tensors with their tp_group"
        )
    if not split:
        return logits.to_local(), labels, tp_group
    mesh, columns = logits.device_mesh, logits.shape[-1]
    group = mesh.get_group(split[0])
    if tp_group is not None and dist.get_process_group_ranks(tp_group) != dist.get_process_group_ranks(group):
        raise ValueError("tp_group is not the group that splits the DTensor's last dimension: leave it out")
    if columns % group.size():
        raise ValueError(
            f"{columns} columns do not divide over {group.size()} ranks, and shards must have one width: pad the "
            "output layer to a multiple and pass the true vocab_size"
        )
    return logits.to_local(), labels, group


def refuse_distributed(**tensors: Tensor) -> None:
    """The operators on hidden states take local tensors: a weight's layout does not say who shares the vocabulary."""
    for name, tensor in tensors.items():
        if DTensor is not None and isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is a DTensor {tensor.placements}: pass {name}.to_local() and tp_group where tensor-parallel "
                f"ranks share the vocabulary, {name}.full_tensor() where FSDP2 has split it, or use "
                "vocab_parallel_log_probs_and_entropy on the logits"
            )
