"""Mean of a per-token quantity in each region, followed over the run: the state of the measuring weight sources.

Measuring and averaging are apart on purpose: :func:`region_sums` is what one rank sees, the caller adds the sums over
its ranks (one all-reduce of 12 numbers), and :class:`RegionMeans` is a plain moving average of the result, equal on
all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rest.types import TokenRegion
from megatron_rest.weighting.curriculum import NUM_REGIONS

__all__ = ["RegionMeans", "region_sums"]


def region_sums(values: Tensor, region_ids: Tensor, loss_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum and count of ``values`` in each region.

    Args:
        values: float ``[T]``, entropy in nats or a score norm; anything (NaN too) where a token is not valid.
        region_ids: int ``[T]``, :class:`TokenRegion`.
        loss_mask: bool ``[T]``; None = every token that is not CONTEXT.

    Returns:
        ``(sums, counts)``, float64 ``[6]`` each on the device of ``values``, detached: add them over ranks and
        microbatches. CONTEXT is always (0, 0).
    """
    if values.shape != region_ids.shape or (loss_mask is not None and loss_mask.shape != values.shape):
        raise ValueError(f"values {tuple(values.shape)}, region_ids and loss_mask must have the same shape [T]")
    valid = region_ids != TokenRegion.CONTEXT
    if loss_mask is not None:
        valid = valid & loss_mask.bool()
    index = region_ids[valid].long()
    sums = torch.zeros(NUM_REGIONS, dtype=torch.float64, device=values.device)
    sums.index_add_(0, index, values.detach()[valid].double())
    return sums, torch.bincount(index, minlength=NUM_REGIONS).double()


class RegionMeans:
    """Exponential moving average of region means; a region not seen yet has none (NaN).

    ``frozen_after_first`` keeps the first measurement of each region for the whole run (the ``entropy_offline``
    source).
    """

    def __init__(self, *, decay: float = 0.9, frozen_after_first: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}, expected a number in [0, 1)")
        self.decay = decay
        self.frozen_after_first = frozen_after_first
        self._mean = np.full(NUM_REGIONS, np.nan)

    @property
    def mean(self) -> np.ndarray:
        """float64 ``[6]``, NaN for regions never measured (a copy)."""
        return self._mean.copy()

    def update(self, sums: Tensor | Sequence[float], counts: Tensor | Sequence[float]) -> None:
        """Fold in one step's global sums and counts, ``[6]`` each.  A region without tokens keeps its mean.

        Raises:
            ValueError: wrong length, or a mean that is not finite (a NaN here would reach every weight of the run).
        """
        total, count = _host(sums, "sums"), _host(counts, "counts")
        for region in np.flatnonzero(count > 0):
            new = total[region] / count[region]
            if not np.isfinite(new):
                raise ValueError(f"mean of region {TokenRegion(region).name} is {new}: check the scoring pass for NaN")
            old = self._mean[region]
            if np.isnan(old):
                self._mean[region] = new
            elif not self.frozen_after_first:
                self._mean[region] = self.decay * old + (1.0 - self.decay) * new

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that restore the average exactly (float64 survives JSON); None = not measured yet."""
        return {"mean": [None if np.isnan(value) else float(value) for value in self._mean]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`.  Raises ValueError if the number of regions differs."""
        values = [np.nan if value is None else value for value in state["mean"]]
        self._mean = _host(values, "mean")


def _host(values: Tensor | Sequence[float], name: str) -> np.ndarray:
    array = np.array(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.shape != (NUM_REGIONS,):
        raise ValueError(f"{name} has shape {array.shape}, expected ({NUM_REGIONS},): one number a TokenRegion")
    return array
