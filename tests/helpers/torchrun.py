"""Run a function on torchrun's ranks from a test: each with a GPU of its own where there is one, else on gloo.

    results = run_on_devices(worker, 2, some_argument)

As ``tests/helpers/distributed.py``, but every rank is a process that has imported everything by itself: CUDA does not
survive a fork.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def run_on_devices(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 400) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank; their results in rank order.

    ``fn`` is importable by its name, results are picklable; a rank that fails ends all, with what they said.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "call.pickle").write_bytes(pickle.dumps((fn.__module__, fn.__qualname__, args)))
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), "-m",
             __name__, folder],
            cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        return [pickle.loads((Path(folder) / f"rank{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _main(folder: Path) -> None:
    module, name, args = pickle.loads((folder / "call.pickle").read_bytes())
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    rank = dist.get_rank()
    result = getattr(importlib.import_module(module), name)(rank, dist.get_world_size(), *args)
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
