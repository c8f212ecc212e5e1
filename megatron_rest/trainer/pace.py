"""A rank that is slower than the others is named.

Ranks wait for each other in every phase, so wall times say nothing: all are as slow as the slowest.  What each does
alone and alike says it: judging an equal share of the step's rollouts (the host), and a product of fixed size (the
device).  Both are compared once a step; one that takes twice as long as the median rank, and so much longer that it is
felt, several steps in a row, is named with its node.
"""

from __future__ import annotations

import logging
import socket
import time

import torch
import torch.distributed as dist

from megatron_rest.help_topics import Topic, see

__all__ = ["Pace", "Straggler"]

_log = logging.getLogger(__name__)

_SIZE = 512  # of the product: some 10 ms on a CPU core
_FACTOR = 2.0  # slower than the median by so much
_STEPS = 3  # in a row; one slow step is nobody's fault
_REPEATED = 50  # steps until a rank that stays slow is said again
_KINDS = {"judging": 0.5, "a product of fixed size": 0.05}  # seconds above the median that are worth a word


class Straggler:
    """Which rank has been slow for how long, from one number a rank and step.

    Args:
        least_seconds: that a slow rank takes longer than the median; less is noise, or felt by nobody.
    """

    def __init__(self, least_seconds: float) -> None:
        self._least = least_seconds
        self._in_a_row: dict[int, int] = {}

    def take(self, seconds: list[float]) -> dict[int, float]:
        """Ranks to name now, with how many times slower than the median they were in this step."""
        median = sorted(seconds)[(len(seconds) - 1) // 2]
        slow = {
            rank: value / median
            for rank, value in enumerate(seconds)
            if value > _FACTOR * median and value > median + self._least
        }
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank in slow}
        return {rank: slow[rank] for rank, count in self._in_a_row.items() if (count - _STEPS) % _REPEATED == 0}


class Pace:
    """Compares the ranks once a step.

    Args:
        rank, world_size: of this process in the job.
        device: that computes.
    """

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self._rank = rank
        self._stragglers = [Straggler(least) for least in _KINDS.values()]
        self._work = torch.ones(_SIZE, _SIZE, device=device)
        self._hosts: list[str] = [""] * world_size
        dist.all_gather_object(self._hosts, socket.gethostname())

    def compare(self, step: int, *, judging_seconds: float) -> None:
        """Collective: one all-gather of two float64 numbers over all ranks."""
        mine = torch.tensor([judging_seconds, self._probe()], dtype=torch.float64)
        table = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(table, mine)
        for kind, straggler, column in zip(_KINDS, self._stragglers, torch.stack(table).T.tolist(), strict=True):
            for rank, factor in straggler.take(column).items():
                if self._rank == 0:
                    _log.warning(
                        "step %d: rank %d on %s is slow, and all ranks with it: %s takes %.3g s there, %.1f times as "
                        "long as on the median rank, %d steps in a row%s",
                        step, rank, self._hosts[rank], kind, column[rank], factor, _STEPS, see(Topic.HANG),
                    )  # fmt: skip

    def _probe(self) -> float:
        """Seconds of the fixed work, the better of two: the first may wake the device."""
        return min(self._timed() for _ in range(2))

    def _timed(self) -> float:
        started = time.perf_counter()
        (self._work @ self._work)[0, 0].item()  # waits for the device
        return time.perf_counter() - started
