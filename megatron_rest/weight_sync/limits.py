"""How fast a weight transfer can be: bytes over links, as printed limits.  Arithmetic only; imports without torch.

    megatron-rest plan-sync                                        # 8B, 70B, 235B, 671B at usual layouts
    megatron-rest plan-sync --model 70B --train-gpus 128 --engine-gpus 8 --replicas 4 --nic-gbit 400

With S bytes of one full copy in the data type that travels, N training GPUs, R replicas of G GPUs, B bytes/s of a GPU's
network card, B_nv of its NVLink, B_hbm of its memory:

    slices       max(R S / (N B), S / (G B))      every source sends its share, every worker takes its own slice
    broadcast    S / B                            every worker takes everything; more roots do not help the takers
    node-wide    S / (B GPUs-a-node)              the same, each card of a node taking a part, shared over NVLink
    colocated    max(S / (G B_nv), 2 S / (G B_hbm))   slices between GPUs of one node; each byte is read and written
    through disk 2 S / B_disk                     written once, read once, by all at the rate of the file system

These are lower bounds: nothing is faster.  ``expected`` divides by the share of the line rate that an implementation
reaches; the default of one half is a goal, not a measurement (no GPU was at hand).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = [
    "BYTES_PER_WEIGHT",
    "MESSAGES_UNDER_WAY",
    "MODELS",
    "PACKED_BYTES",
    "Links",
    "SyncLimits",
    "SyncSetting",
    "main",
    "sync_limits",
]

MESSAGES_UNDER_WAY = 8  # of slices, at a sender and at a worker: enough that no card waits for one slow peer
PACKED_BYTES = 64 << 20  # most of a message that is packed from small pieces

BYTES_PER_WEIGHT = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0 + 4.0 / 128**2,  # one float32 scale for each block of 128 x 128
}
EXPECTED_SHARE = 0.5  # of the line rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Rates in bytes a second, one way, of one GPU; defaults: H100 SXM with one 400 Gbit/s card each."""

    nic: float = 50e9
    nvlink: float = 450e9
    hbm: float = 3.35e12
    disk: float = 20e9  # of the file system, all nodes together
    gpus_per_node: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncSetting:
    """One transfer: what travels, from how many GPUs into how many."""

    num_parameters: float
    train_gpus: int
    engine_gpus: int  # of one replica (TP x EP x DP inside the engine)
    replicas: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in BYTES_PER_WEIGHT:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(BYTES_PER_WEIGHT)}")
        if self.num_parameters <= 0 or min(self.train_gpus, self.engine_gpus, self.replicas) < 1:
            raise ValueError(f"numbers of parameters, GPUs and replicas must be positive: {self}")

    @property
    def num_bytes(self) -> float:
        """Of one full copy."""
        return self.num_parameters * BYTES_PER_WEIGHT[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncLimits:
    """Lower bounds in seconds."""

    slices: float
    broadcast: float
    node_wide: float
    colocated: float
    disk: float

    @property
    def expected(self) -> float:
        """Of slices, at half of the line rate."""
        return self.slices / EXPECTED_SHARE


MODELS = {
    "8B": SyncSetting(num_parameters=8.03e9, train_gpus=8, engine_gpus=1, replicas=8),
    "70B": SyncSetting(num_parameters=70.6e9, train_gpus=64, engine_gpus=8, replicas=4),
    "235B": SyncSetting(num_parameters=235e9, train_gpus=128, engine_gpus=16, replicas=4),
    "671B": SyncSetting(num_parameters=671e9, train_gpus=256, engine_gpus=32, replicas=8),
}
"""Usual settings: Llama 3 8B and 70B, Qwen3 235B-A22B, DeepSeek V3."""


def sync_limits(setting: SyncSetting, links: Links | None = None) -> SyncLimits:
    """The formulas above."""
    links = links or Links()
    size = setting.num_bytes
    out = setting.replicas * size / (setting.train_gpus * links.nic)
    into = size / (setting.engine_gpus * links.nic)
    return SyncLimits(
        slices=max(out, into),
        broadcast=size / links.nic,
        node_wide=size / (links.nic * links.gpus_per_node),
        colocated=max(size / (setting.engine_gpus * links.nvlink), 2 * size / (setting.engine_gpus * links.hbm)),
        disk=2 * size / links.disk,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the limits of one setting, or of the usual ones."""
    parser = argparse.ArgumentParser(
        prog="megatron-rest plan-sync", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help=f"one of {', '.join(MODELS)}, or a number of parameters in billions")
    parser.add_argument("--train-gpus", type=int)
    parser.add_argument("--engine-gpus", type=int, help="GPUs of one replica")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--dtype", choices=list(BYTES_PER_WEIGHT))
    parser.add_argument("--nic-gbit", type=float, default=400, help="network card of one GPU, Gbit/s (400)")
    parser.add_argument("--nvlink-gbyte", type=float, default=450, help="NVLink of one GPU, one way, GB/s (450)")
    parser.add_argument("--disk-gbyte", type=float, default=20, help="file system, all nodes together, GB/s (20)")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    options = parser.parse_args(argv)
    links = Links(
        nic=options.nic_gbit / 8 * 1e9,
        nvlink=options.nvlink_gbyte * 1e9,
        disk=options.disk_gbyte * 1e9,
        gpus_per_node=options.gpus_per_node,
    )
    try:
        settings = {name: _changed(base, options) for name, base in _chosen(options.model).items()}
    except ValueError as error:
        parser.error(str(error))
    print(_table(settings, links))
    return 0


def _chosen(model: str | None) -> dict[str, SyncSetting]:
    if model is None:
        return MODELS
    if model in MODELS:
        return {model: MODELS[model]}
    try:
        billions = float(model.removesuffix("B"))
    except ValueError:
        raise ValueError(f"--model {model}: neither one of {', '.join(MODELS)} nor a number of billions") from None
    return {model: replace(MODELS["8B"], num_parameters=billions * 1e9)}


def _changed(base: SyncSetting, options: argparse.Namespace) -> SyncSetting:
    names = ("train_gpus", "engine_gpus", "replicas", "dtype")
    return replace(base, **{name: getattr(options, name) for name in names if getattr(options, name) is not None})


def _table(settings: dict[str, SyncSetting], links: Links) -> str:
    head = (
        f"network {links.nic / 1e9:g} GB/s and NVLink {links.nvlink / 1e9:g} GB/s a GPU, "
        f"file system {links.disk / 1e9:g} GB/s; lower bounds in seconds"
    )
    columns = ("model", "dtype", "GB", "layout", "slices", "expected", "broadcast", "node-wide", "colocated", "disk")
    rows: list[tuple[str, ...]] = [columns]
    for name, setting in settings.items():
        limits = sync_limits(setting, links)
        seconds = (limits.slices, limits.expected, limits.broadcast, limits.node_wide, limits.colocated, limits.disk)
        layout = f"{setting.train_gpus} -> {setting.replicas} x {setting.engine_gpus}"
        rows.append((name, setting.dtype, f"{setting.num_bytes / 1e9:.0f}", layout, *(f"{s:.3g}" for s in seconds)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    foot = "expected: slices at half of the line rate, which is a goal; nothing was measured on GPUs"
    return "\n".join([head, *lines, foot])


if __name__ == "__main__":
    raise SystemExit(main())
