"""What this machine must have before a job waits for it: looked at by every process first, each fault one line.

Nothing here talks to another process, and nothing is started before it is done.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megatron_rest.config import ConfigError, RestConfig
from megatron_rest.help_topics import Topic, see
from megatron_rest.network import check_port
from megatron_rest.user_code import check_shipped

__all__ = ["GPUS_PER_NODE", "JOB_LOG", "MachineError", "check_gpus", "check_machine", "say_in_job_log"]

GPUS_PER_NODE = "REST_GPUS_PER_NODE"
"""Environment variable of a job: GPUs that every node of it shows.  A node that sees none would train on its CPU."""


JOB_LOG = "REST_JOB_LOG"
"""Environment variable: file descriptor of the job's own log, given to processes whose output goes elsewhere."""


class MachineError(ConfigError):
    """Something is wrong with one machine of the job; its own processes say so."""


def check_machine(config: RestConfig, *, trains: bool = True, environ: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError, or MachineError for what may be wrong on this machine alone."""
    environ = os.environ if environ is None else environ
    check_gpus(int(environ.get(GPUS_PER_NODE, "0")), environ)
    for key, path in (("model.path", config.model.path), ("data.train", config.data.train if trains else "")):
        if path and Path(path).is_absolute() and not Path(path).is_dir():
            raise MachineError(
                f"{key}={path} is not a folder on {socket.gethostname()}: is the storage that holds it mounted there "
                f"(in a container: REST_MOUNTS)?{see(Topic.NO_START)}"
            )
    if environ.get("RANK") == "0" and "MASTER_PORT" in environ and "TORCHELASTIC_RUN_ID" not in environ:
        check_port(int(environ["MASTER_PORT"]))  # torchrun listens there itself
    check_shipped(config, environ)


def say_in_job_log(text: str) -> None:
    """A line where the user looks first; nothing where the launcher has given no :data:`JOB_LOG`."""
    if log := os.environ.get(JOB_LOG):
        with suppress(OSError, ValueError):
            os.write(int(log), f"{text}\n".encode())


def check_gpus(expected: int, environ: Mapping[str, str] | None = None) -> None:
    """Raises MachineError if this machine should show ``expected`` GPUs and PyTorch cannot use as many."""
    if not expected:
        return
    import torch

    environ = os.environ if environ is None else environ
    seen, where = torch.cuda.device_count(), socket.gethostname()
    if torch.version.cuda is None:
        raise MachineError(
            f"{where} should use {expected} GPUs, and PyTorch {torch.__version__} there was built without CUDA: name "
            f"an interpreter or image that has the CUDA build (REST_PYTHON, REST_IMAGE){see(Topic.NO_START)}"
        )
    if seen == 0 or not torch.cuda.is_available():
        shown = environ.get("CUDA_VISIBLE_DEVICES")
        raise MachineError(
            f"{where} should use {expected} GPUs, and PyTorch {torch.__version__} (CUDA {torch.version.cuda}) can use "
            f"none{_why_none()}"
            + (f"; CUDA_VISIBLE_DEVICES is {shown!r}" if shown is not None else "")
            + ": compare nvidia-smi there with docs/launch.md (driver), and what the job asks for (gpus_per_node)"
            + see(Topic.NO_START)
        )
    if seen < expected:
        raise MachineError(
            f"{where} should show {expected} GPUs to every process, and shows {seen}: ask for whole nodes "
            "(run.executor.gpus_per_node), without binding GPUs to tasks (--gpus-per-task, --gpu-bind)"
            f"{see(Topic.NO_START)}"
        )


def _why_none() -> str:
    """PyTorch's own words: no driver, one that is too old, ..."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({' '.join(str(error).split())})"
    return ""
