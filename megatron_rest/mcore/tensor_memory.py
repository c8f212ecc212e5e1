"""Bytes of all tensors that are alive in this process, counted where torch's operators make them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TensorMemory"]


class TensorMemory(TorchDispatchMode):
    """Inside the ``with`` block: ``alive`` and ``peak`` bytes of storages made there, views counted once.

    Args:
        device_type: count those of one kind of device only, e.g. ``meta``.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._device_type = device_type
        self._known: set[int] = set()

    def mark(self) -> int:
        """Forget the peak so far; returns what is alive."""
        self.peak = self.alive
        return self.alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and self._device_type in (None, value.device.type):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes()
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.alive -= num_bytes
