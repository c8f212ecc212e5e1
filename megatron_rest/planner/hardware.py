"""What a GPU has, by its data sheet, and which share of that a training program gets, by assumption."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["EFFICIENCY", "HARDWARE", "Efficiency", "Hardware"]

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One accelerator and its links; bytes, operations a second, bytes a second."""

    name: str
    memory: int
    bf16_flops: float  # dense; 0 = no time is estimated
    fp8_flops: float
    memory_bandwidth: float
    nvlink: float  # one direction
    nic: float  # one GPU's share of its node's network
    host: float  # to its host's memory, one direction
    gpus_per_node: int = 8
    reserve: int = 3 * GIB
    """Not ours: CUDA context and kernels (0.5), NCCL channels of five groups (about 1.5), fragmentation (1)."""
    holes: float = 0.0
    """Free memory between blocks, of what an update needs; on a GPU a part of ``reserve``."""

    @property
    def is_cpu(self) -> bool:
        return self.bf16_flops == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Shares of the data sheet's rates, and what is there besides.  Not measured here: fitted to the published points
    of ``published.py`` where that is said.
    """

    training: float = 0.40  # of peak operations, forward and backward, pipeline bubble not counted (fitted)
    scoring: float = 0.45  # forward only: no gradient all-reduce, no optimiser
    experts: float = 0.43  # with experts, of the BF16 peak whatever the recipe: small products (fitted)
    expert_moves: float = 7.5  # of a row to each of its experts in a forward pass, at NVLink's rate (fitted)
    prefill: float = 0.50
    decode_bandwidth: float = 0.60  # of memory bandwidth while decoding
    decode_experts: float = 0.35  # the same where experts are read (fitted)
    all_reduce: float = 15e-6  # seconds of a small all-reduce inside a node while decoding
    all_reduce_far: float = 80e-6  # between nodes (fitted)
    decode_step: float = 3e-3  # seconds of the engine's host between two steps (fitted)
    between: float = 0.10  # of a step that is neither: data, refit, engines that wake up (fitted)
    links: float = 0.80  # of NVLink, network and the way to the host
    tp_exposed: float = 1.0  # of TP's traffic, what no computation hides: ours is not overlapped


EFFICIENCY = Efficiency()

# NVLink 4: 900 GB/s both ways; one 400 Gb/s network adapter a GPU; PCIe 5 x16 (A100: 4) to the host
HARDWARE = {
    "h100": Hardware(
        name="h100", memory=80 * 10**9, bf16_flops=989e12, fp8_flops=1979e12, memory_bandwidth=3.35e12, nvlink=450e9,
        nic=50e9, host=64e9,
    ),
    "h200": Hardware(
        name="h200", memory=141 * 10**9, bf16_flops=989e12, fp8_flops=1979e12, memory_bandwidth=4.8e12, nvlink=450e9,
        nic=50e9, host=64e9,
    ),
    "a100": Hardware(
        name="a100", memory=80 * 10**9, bf16_flops=312e12, fp8_flops=312e12, memory_bandwidth=2.04e12, nvlink=300e9,
        nic=25e9, host=32e9,
    ),
    "b200": Hardware(
        name="b200", memory=180 * 10**9, bf16_flops=2250e12, fp8_flops=4500e12, memory_bandwidth=8e12, nvlink=900e9,
        nic=50e9, host=64e9,
    ),
    "cpu": Hardware(
        name="cpu", memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), bf16_flops=0, fp8_flops=0,
        memory_bandwidth=0, nvlink=0, nic=0, host=0,
        reserve=730 * 10**6,  # libraries and an engine that has sampled, less its weights and cache: measured
        holes=0.25,  # measured: microbatches differ in size, so one does not fit where the one before it lay
    ),
}  # fmt: skip
"""Data-sheet values: dense rates, decimal gigabytes.  ``cpu``: this machine, its memory shared by all ranks."""
