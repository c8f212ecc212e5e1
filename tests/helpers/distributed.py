"""Run a function on several real gloo ranks from a test: fresh processes, imports done (``tests/helpers/forked.py``).

    results = run_distributed(worker, 4, some_argument)

``worker(rank, world_size, *args)`` must be importable (module level); the default process group exists when it runs.
What it returns (picklable) comes back in rank order; the first exception of any rank is raised here with its traceback.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers import forked

WHOLE_TEST = 600.0  # seconds, pytest's own limit


def _main(rank: int, fn: Callable[..., Any], world_size: int, folder: str, seconds: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    out = Path(folder) / f"rank{rank}.pickle"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        failed, result = 0, fn(rank, world_size, *args)
    except BaseException:  # noqa: BLE001  reported to the parent, which raises
        failed, result = time.monotonic_ns(), traceback.format_exc()  # of all processes of the machine the same clock
    out.with_suffix(".part").write_bytes(pickle.dumps((failed, result)))
    out.with_suffix(".part").rename(out)
    if failed:
        os._exit(1)  # a rank that failed must not wait for its peers in a destructor
    dist.barrier()
    dist.destroy_process_group()


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: int = 400) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on ``world_size`` gloo ranks; return their results in rank order.

    ``timeout`` (seconds) is that of a collective: long, since ranks on a busy machine wait for one another.  One above
    pytest's own limit is that of the whole call, too: a benchmark's.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [forked.start(_main, rank, fn, world_size, folder, timeout, args) for rank in range(world_size)]
        status = forked.wait(ranks, timeout=max(WHOLE_TEST, timeout))
        said = {
            rank: pickle.loads(path.read_bytes())
            for rank in range(world_size)
            if (path := Path(folder) / f"rank{rank}.pickle").exists()
        }
        failures = sorted((when, rank) for rank, (when, _) in said.items() if when)
        if failures:  # the later ones are of ranks that waited for the first
            rank = failures[0][1]
            raise AssertionError(f"rank {rank} of {world_size} failed:\n{said[rank][1]}")
        assert status == 0, f"a rank ended with status {status}"
        return [result for _, result in said.values()]
