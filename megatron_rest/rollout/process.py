"""Settings that a process needs before torch and vLLM are imported.  Standard library only.

The OpenMP runtime reads its variables when it is loaded, that is when torch is imported.  On CPU they decide speed:
with the default active spinning and any load beside it vLLM decodes 20 to 70 times slower.  A worker entry calls
:func:`prepare_process` as its first statement; a value that is already set is kept, so a launcher or a user may choose.
"""

from __future__ import annotations

import os
import sys

__all__ = ["ProcessNotPreparedError", "cpu_share", "has_gpu_driver", "prepare_process"]

_BEFORE_TORCH = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take the core from the rank that has work
    "OMP_NUM_THREADS": "1",
}
_BEFORE_VLLM = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default pins threads, every rank's to the same cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process: weights are handed over by reference
    "TORCHDYNAMO_DISABLE": "1",  # else the first request for log-probs compiles a kernel, which needs a C++ compiler
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
_ON_CPU_ONLY = ("VLLM_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE")


class ProcessNotPreparedError(RuntimeError):
    """torch or vLLM was imported before the settings they read at import were made."""


def has_gpu_driver() -> bool:
    """Whether this machine has an NVIDIA driver; answers without importing torch, which would be too early."""
    return os.path.exists("/dev/nvidiactl")


def cpu_share() -> int:
    """CPU threads of this rank: the cores that this process may use, divided by the ranks that a launcher put here."""
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def prepare_process(*, threads: int = 1, cpu: bool = True, allow_late: bool = False) -> None:
    """Set what vLLM and OpenMP read at import; call it before importing torch.  Idempotent; values already set are
    kept.

    Args:
        threads: OpenMP threads of this process.
        cpu: False leaves out what is only right on a machine without a GPU (it would switch off torch.compile).
        allow_late: accept that torch is there already (a test session): correct, but possibly slow.

    Raises ProcessNotPreparedError when torch is loaded and an OpenMP variable is unset, or vLLM is loaded and one of
    its variables is unset.
    """
    wanted = {**_BEFORE_TORCH, "OMP_NUM_THREADS": str(threads)} if cpu else {}
    for module, variables in (("torch", wanted), ("vllm", _BEFORE_VLLM)):
        names = [name for name in variables if name not in os.environ and (cpu or name not in _ON_CPU_ONLY)]
        if names and module in sys.modules and not allow_late:
            settings = " ".join(f"{name}={variables[name]}" for name in names)
            raise ProcessNotPreparedError(
                f"{module} was imported before prepare_process() could set {', '.join(names)}: "
                f"call it first, or start the process with {settings}"
            )
        for name in names:
            os.environ[name] = variables[name]
    dynamo = sys.modules.get("torch._dynamo.config")
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1" and dynamo is not None:
        dynamo.disable = True  # type: ignore[attr-defined]  # it has read the variable already
