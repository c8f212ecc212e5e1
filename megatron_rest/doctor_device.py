"""The doctor on this machine's accelerations: fused parts, FP8 recipes, ways to move tensors between processes.

Each function takes what a probe process found (``None``: it failed or was not tried, and nothing is said) and returns
findings; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rest.finding import OFF, OK, Finding
from megatron_rest.fp8_support import REQUIREMENTS, Machine, why_not

__all__ = ["accelerations", "recipes", "transports"]

_INFINIBAND = Path("/sys/class/infiniband")
_TE_NEED = "Transformer Engine on a machine with a CUDA device"


def accelerations(found: Mapping[str, Any] | None) -> list[Finding]:
    """``found``: :class:`megatron_rest.mcore.accelerations.Accelerations` as a mapping."""
    if found is None:
        return []
    rows = (
        ("fused layers and norms", "are_layers_fused", "layers", _TE_NEED),
        ("fused Adam", "is_optimizer_fused", "optimizer", f"{_TE_NEED}, or NVIDIA Apex built from source"),
        (
            "fused weight gradients",
            "are_weight_gradients_fused",
            "weight_gradients",
            f"{_TE_NEED} (layers), or NVIDIA Apex built with --cuda_ext (output layer too)",
        ),
    )
    return [
        Finding(name=name, state=OK, detail=found[detail])
        if found[flag]
        else Finding(name=name, state=OFF, detail=found[detail], mend=f"needs {need}")
        for name, flag, detail, need in rows
    ]


def recipes(found: Mapping[str, Any] | None) -> list[Finding]:
    """``found``: a :class:`megatron_rest.fp8_support.Machine` as a mapping, the trainer's own view."""
    if found is None:
        return []
    machine = Machine(**{**found, "capability": tuple(found["capability"])})
    findings = []
    for recipe, need in REQUIREMENTS.items():
        obstacle = why_not(recipe, machine)
        if obstacle is None:
            detail = f"precision.recipe={recipe}, token block {need.block}"
            findings.append(Finding(name=f"FP8 {recipe}", state=OK, detail=detail))
        else:
            lacks, _, needs = obstacle.partition("; ")
            findings.append(Finding(name=f"FP8 {recipe}", state=OFF, detail=lacks, mend=needs))
    return findings


def transports(found: Mapping[str, Any] | None) -> list[Finding]:
    """``found``: GPUs, torch.distributed backends, and the names that ``weight_sync.transport`` may take."""
    if found is None:
        return []
    gloo = None if found["gloo"] else ("this torch has no gloo", "needs a torch that was built with it")
    nccl = None
    if not (found["nccl"] and found["gpus"]):
        lacks = "no CUDA device" if found["nccl"] else "this torch has no NCCL"
        nccl = (lacks, "needs torch's CUDA build and NVIDIA GPUs")
    obstacles = {"local": None, "gloo": gloo, "nccl": nccl}
    what = {
        "local": "an engine in the trainer's process takes tensors by reference",
        "gloo": "slices between CPU tensors of ranks and engine workers",
        "nccl": "slices between GPUs of ranks and engine workers",
    }
    rows = [(f"weight transfer {name}", what[name], obstacles[name]) for name in found["transports"]]
    rows.append(("NCCL", f"collectives between {len(found['gpus'])} GPUs", nccl))
    findings = [
        Finding(name=name, state=OK, detail=detail)
        if obstacle is None
        else Finding(name=name, state=OFF, detail=obstacle[0], mend=obstacle[1])
        for name, detail, obstacle in rows
    ]
    devices = sorted(path.name for path in _INFINIBAND.glob("*")) if _INFINIBAND.is_dir() else []
    if devices:
        findings.append(Finding(name="InfiniBand", state=OK, detail=", ".join(devices)))
    else:
        need = "needs a host adapter with its driver; in a container, /dev/infiniband passed in"
        findings.append(Finding(name="InfiniBand", state=OFF, detail="no device: nodes talk over TCP", mend=need))
    return findings
