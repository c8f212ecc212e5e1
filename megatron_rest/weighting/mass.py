"""Who gets the gradient: the share of the total weight that each region holds, as a metric."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_rest.types import TokenRegion

__all__ = ["region_weight_mass"]


def region_weight_mass(
    token_weights: Tensor | np.ndarray, region_ids: Tensor | np.ndarray, loss_mask: Tensor | np.ndarray | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """``{"weight_mass/think": (weight in the region, total weight), ...}`` of ``[T]`` tokens, float64 scalars.

    Pairs are (sum, count) like every other metric: add both over microbatches and ranks, divide once.  The shares of
    all regions but CONTEXT add up to 1.  Compare with the region's share of tokens to see what the weights do.
    """
    weights = torch.as_tensor(token_weights).detach().double()
    regions = torch.as_tensor(region_ids)
    if weights.shape != regions.shape:
        raise ValueError(f"token_weights {tuple(weights.shape)} and region_ids {tuple(regions.shape)} must match")
    valid = regions != TokenRegion.CONTEXT
    if loss_mask is not None:
        valid = valid & torch.as_tensor(loss_mask).bool()
    mass = torch.zeros(len(TokenRegion), dtype=torch.float64, device=weights.device)
    mass.index_add_(0, regions[valid].long(), weights[valid])
    total = mass.sum()
    return {f"weight_mass/{region.name.lower()}": (mass[region], total) for region in TokenRegion if region}
