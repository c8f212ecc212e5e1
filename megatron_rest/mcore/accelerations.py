"""Which fused parts of Transformer Engine and NVIDIA Apex run in this process, chosen by what is there.

* Layers and norms: Transformer Engine's where it is installed with a GPU (``specs.py``), else Megatron's and torch's.
* Adam: Megatron takes Transformer Engine's, else Apex's, else torch's, when it is imported.
* Tokens sorted by expert (``moe_permute_fusion``): Transformer Engine's kernels where they are.
* Weight gradients added to ``main_grad`` inside the matrix product: Apex's extension ``fused_weight_gradient_mlp_cuda``
  switches it on for the whole model.  Transformer Engine's layers can do it alone; Megatron's one flag for both would
  then fail in the output layer, so the layers are switched one by one (:func:`fuse_weight_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_rest.mcore.specs import has_transformer_engine

__all__ = ["Accelerations", "active", "fuse_weight_gradients", "has_apex_weight_gradients", "has_fused_permutation"]

_TE_SWITCH = "fuse_wgrad_accumulation"  # attribute of Transformer Engine's linear layers, read at every forward pass


def has_apex_weight_gradients() -> bool:
    """Whether Megatron's own linear layers can add weight gradients to ``main_grad`` (Apex's extension, with a GPU)."""
    from megatron.core.tensor_parallel import layers

    return torch.cuda.is_available() and layers._grad_accum_fusion_available


def has_fused_permutation() -> bool:
    """Whether tokens can be sorted by expert without the host knowing how many each gets (Transformer Engine)."""
    from megatron.core.transformer.moe import moe_utils

    names = ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs", "unpermute")
    return has_transformer_engine() and all(getattr(moe_utils, f"fused_{name}", None) for name in names)


def fuse_weight_gradients(model: Any) -> int:
    """Let Transformer Engine's layers of ``model`` add weight gradients to ``main_grad``; returns how many there are.

    The layers look for ``weight.main_grad``, which Megatron's DistributedDataParallel makes: wrap before training.
    """
    parts = [part for part in model.modules() if hasattr(part, _TE_SWITCH)]
    for part in parts:
        setattr(part, _TE_SWITCH, True)
    return len(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerations:
    """What runs in this process, in words; ``is_X_fused`` says whether it is the fused one."""

    layers: str
    are_layers_fused: bool
    optimizer: str
    is_optimizer_fused: bool
    weight_gradients: str
    are_weight_gradients_fused: bool

    def __str__(self) -> str:
        return f"layers: {self.layers}; optimiser: {self.optimizer}; weight gradients: {self.weight_gradients}"


def active() -> Accelerations:
    """What Megatron and we chose here.  Imports Megatron; no process group is needed."""
    from megatron.core import optimizer

    has_te, has_apex_gradients = has_transformer_engine(), has_apex_weight_gradients()
    return Accelerations(
        layers=f"Transformer Engine {_te_version()}" if has_te else "Megatron's local layers, torch norms",
        are_layers_fused=has_te,
        optimizer=f"{optimizer.Adam.__module__.split('.')[0]} {optimizer.Adam.__name__}",
        is_optimizer_fused=not optimizer.USING_PYTORCH_OPTIMIZER,
        weight_gradients="fused everywhere (Apex)"
        if has_apex_gradients
        else "fused in the layers (Transformer Engine)"
        if has_te
        else "added after the product",
        are_weight_gradients_fused=has_apex_gradients or has_te,
    )


def _te_version() -> str:
    import transformer_engine

    return str(transformer_engine.__version__)
