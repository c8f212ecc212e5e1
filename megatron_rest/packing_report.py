"""How packed microbatches came out: what trains reports it, what plans foresees it.  No torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PackingReport"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingReport:
    """How the samples of one optimiser step were dealt out, over all replicas."""

    num_microbatches: int  # of each replica
    num_empty: int  # microbatches without a sample: there were fewer samples than places
    rows: int  # that go through the layers, padding of sequences included
    plain_rows: int  # the same with every sequence whole
    prompt_copies: float  # of a group on average; 1: every group lies in one microbatch
    imbalance: float  # work of the slowest replica, relative to the mean
