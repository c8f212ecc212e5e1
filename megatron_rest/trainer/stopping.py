"""SIGTERM before a time limit: the step is finished and saved, then every rank leaves together.

A scheduler warns every rank, but not at the same moment of a step.  So the signal only makes a note; between two steps
all ranks agree (one all-reduce of one number), and one rank's note stops all of them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["StopRequest"]


class StopRequest:
    """Notes SIGTERM inside its ``with`` block; a second SIGTERM gets what the first one would have got outside.

    Args:
        device: where the flag is reduced (NCCL reduces on GPUs only).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_noted = False
        self._before: Callable[[int, FrameType | None], Any] | int | None = None

    def is_agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank.

        Collectives: one MAX all-reduce of one int32 over all ranks.
        """
        flag = torch.tensor([self._is_noted], dtype=torch.int32, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._is_noted = True
        signal.signal(signal.SIGTERM, self._before)
