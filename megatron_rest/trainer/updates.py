"""What an optimiser update has to compute, and what it need not.

A group whose advantages are all 0 gives the clipped loss no gradient.  Its samples leave before anything is computed
from them; they still count in the denominators, so loss and gradient are those of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rest.config import LossConfig
from megatron_rest.data.batching import batch_totals
from megatron_rest.passes import has_gradient_without_advantage
from megatron_rest.types import BatchTotals, TrainSample

__all__ = ["UpdateSamples", "split_updates"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateSamples:
    """Samples of one optimiser update."""

    trained: tuple[TrainSample, ...]
    left_out: tuple[TrainSample, ...]  # no gradient comes from them
    totals: BatchTotals  # of both


def split_updates(
    samples: Sequence[TrainSample], *, num_updates: int, loss: LossConfig, keeps_all: bool = False
) -> list[UpdateSamples]:
    """Samples of each update, in order; whole groups stay together as far as the split allows.

    ``keeps_all``: token credit gives some a gradient whose rollout's advantage is 0.
    """
    size = len(samples) // num_updates
    keeps_all = keeps_all or has_gradient_without_advantage(loss)
    updates = []
    for start in range(0, len(samples), size):
        mine = samples[start : start + size]
        trained = tuple(s for s in mine if keeps_all or s.advantage != 0.0)
        left_out = tuple(s for s in mine if not keeps_all and s.advantage == 0.0)
        updates.append(UpdateSamples(trained=trained, left_out=left_out, totals=batch_totals(mine)))
    return updates
