"""Gradients and optimiser state out of the device's memory while engines sample there.

Storage by storage and in place, so every tensor and every view of one stays what it is: only its memory comes and goes.
Megatron's own hook for the state (``MegatronOptimizer.offload_to_cpu``) moves each parameter of the optimiser to a new
place instead; where those are views of the model's weights (float32 training, the float32 parameters of a 16-bit model)
the optimiser would update copies from then on that no forward pass reads.  Storages of weights stay here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["Offload"]


class Offload:
    """What only updates need, of one rank.

    Args:
        chunks: DDP-wrapped model chunks.
        optimizer: Megatron optimiser, a chain of them included.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._gradients: list[tuple[torch.UntypedStorage, int]] = []
        self._state: list[tuple[torch.UntypedStorage, torch.Tensor]] = []  # and its bytes on the host
        self._pages: dict[int, list[torch.Tensor]] = {}  # pinned host memory by size, kept: pinning is slow
        self.is_away = False

    def leave(self) -> int:
        """Give the memory back; returns how many bytes.  Gradients are forgotten, the state is kept on the host."""
        if self.is_away:
            return 0
        self.is_away = True
        weights = {tensor.untyped_storage().data_ptr() for tensor in _weights(self._chunks)}
        gradients = _storages(_gradients(self._chunks), besides=weights)
        state = _storages(_state(self._optimizer), besides=weights | gradients.keys())
        self._gradients = [(storage, storage.nbytes()) for storage in gradients.values()]
        self._state = [(storage, self._page(storage)) for storage in state.values()]
        for storage, page in self._state:
            page.copy_(_bytes_of(storage), non_blocking=True)
        _finish()
        storages = [storage for storage, _ in (*self._gradients, *self._state)]
        freed = sum(storage.nbytes() for storage in storages)
        for storage in storages:
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what this process keeps for itself the engine's allocator could not have
        return freed

    def come_back(self) -> None:
        """Everything as it was, gradients 0; does nothing to what has not left."""
        if not self.is_away:
            return
        for storage, size in self._gradients:
            storage.resize_(size)
            _bytes_of(storage).zero_()
        for storage, page in self._state:
            storage.resize_(page.numel())
            _bytes_of(storage).copy_(page, non_blocking=True)
        _finish()
        for _, page in self._state:
            self._pages.setdefault(page.numel(), []).append(page)
        self._gradients, self._state, self.is_away = [], [], False

    def _page(self, storage: torch.UntypedStorage) -> torch.Tensor:
        free = self._pages.get(storage.nbytes())
        if free:
            return free.pop()
        return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")


def _weights(chunks: Sequence[Any]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        yield from chunk.module.parameters()
        yield from chunk.module.buffers()
        yield from (b.param_data for b in _ddp_buffers(chunk) if b.param_data is not None)


def _gradients(chunks: Sequence[Any]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        yield from (b.grad_data for b in _ddp_buffers(chunk) if b.grad_data is not None)


def _ddp_buffers(chunk: Any) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _state(optimizer: Any) -> Iterator[torch.Tensor]:
    """Masters and moments."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            yield from group["params"]
        for values in inner.state.values():
            yield from (value for value in values.values() if isinstance(value, torch.Tensor))


def _storages(tensors: Iterator[torch.Tensor], *, besides: Any) -> dict[int, torch.UntypedStorage]:
    """Each once, by address; scalars (counters of steps) stay."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.dim() and storage.nbytes() and storage.data_ptr() not in besides:
            found[storage.data_ptr()] = storage
    return found


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
