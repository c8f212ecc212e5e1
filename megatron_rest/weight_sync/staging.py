"""Memory for what arrives, lent again once nobody looks at it any more."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

__all__ = ["Staging"]


class Staging:
    """Buffers for messages and for a worker's tensors, kept from one transfer to the next.

    Fresh pages cost the kernel more than the bytes that are written to them (1.6 GiB/s beside a copy of 9), and an
    allocator gives large blocks back to it at once.  vLLM keeps views of what it was handed until a layer is complete;
    so a block comes back by itself, when the last tensor that shares its memory has gone.  What is kept is what a
    transfer needs at its peak: the largest tensor, or the tensors of a layer, and the messages under way.  On a GPU
    torch's allocator does all this.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, list[np.ndarray]] = {}  # by size: every transfer asks for the same sizes
        self.num_bytes = 0
        """Allocated here so far, lent or free."""

    def empty(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] with whatever is in it."""
        if self._device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        blocks = self._free.setdefault(num_bytes, [])
        if not blocks:
            blocks.append(np.empty(num_bytes, dtype=np.uint8))
            self.num_bytes += num_bytes
        block = blocks.pop()
        lent = block.view()  # torch's storage holds this object, and it holds the block
        weakref.finalize(lent, blocks.append, block).atexit = False
        return torch.from_numpy(lent)
