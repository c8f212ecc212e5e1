"""A collective that nobody comes to says who was waited for.

1. a rank that is stopped (SIGSTOP), and one that is stuck in its own code, are named by those who waited; what they
   waited in is named with its line
2. half-way to the limit it is said as a warning
3. errors of no collective stay as they are
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_rest.trainer import watch
from megatron_rest.trainer.watch import Sign, Watch, describe, where_it_failed
from tests.helpers.distributed import run_distributed

LIMIT = 8.0


def waiting(rank: int, world_size: int) -> tuple[str, str]:
    """Rank 0 waits for rank 1, which is stopped, and for rank 2, which is busy with something else."""
    watch._BEAT_SECONDS, watch._SILENT_SECONDS = 0.1, 3.0
    group = dist.new_group(timeout=timedelta(seconds=LIMIT))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(watch.__name__).addHandler(handler)
    failure = ""
    try:
        with Watch(rank=rank, world_size=world_size, limit_seconds=LIMIT) as place:
            place.enter(7, "reward")
            while [sign.phase for sign in place.signs().values()] != ["reward"] * world_size:
                time.sleep(0.05)
            dist.barrier()
            if rank == 1:
                subprocess.Popen(["sh", "-c", f"sleep {LIMIT + 2}; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            elif rank == 2:
                time.sleep(LIMIT + 2)
            else:
                place.enter(7, "update")
                dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError:
        failure = traceback.format_exc()
    dist.barrier()
    return failure, "\n".join(said)


def test_who_was_waited_for_is_named() -> None:
    (failure, warning), *others = run_distributed(waiting, 3)
    assert "rank 0 waited in all_reduce (trainer/test_watch.py:" in failure
    assert "in phase 'update' of step 7" in failure
    assert "rank 1: NO SIGN OF LIFE for" in failure and "was in reward of step 7" in failure
    assert "rank 2: reward of step 7 for" in failure
    assert re.search(r"step 7 is in update for \d+ s; a collective that takes 8 s ends it", warning), warning
    assert "rank 1: NO SIGN OF LIFE for" in warning
    assert [failure for failure, _ in others] == ["", ""]


def test_ranks_that_do_the_same_share_a_line() -> None:
    def sign(phase: str, *, age: float, step: int = 3) -> Sign:
        return Sign(step=step, phase=phase, phase_seconds=10.0, time=1000.0 - age, host="n1", pid=5)

    signs = {0: sign("sync", age=1), 1: sign("sync", age=2), 2: sign("update", age=99), 3: sign("score", age=0)}
    assert describe(signs, now=1000.0, world_size=6, but=3) == [
        "rank 2: NO SIGN OF LIFE for 99 s, was in update of step 3 on n1 (process 5)",
        "rank 4: has never given a sign of life",
        "rank 5: has never given a sign of life",
        "rank 0, 1: sync of step 3 for 12 s",
    ]


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ValueError) as error:
        raise ValueError("mine")
    assert where_it_failed(error.value) == ""
