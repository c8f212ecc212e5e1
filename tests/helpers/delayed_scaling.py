"""Stand-in for Transformer Engine's delayed scaling, which needs a GPU.

What is kept of release 2.20 is the interface that ``mcore/precision.py`` uses (``fp8_meta``, the state manager's
``reduce_and_update_fp8_tensors``, parameters with ``get_high_precision_init_val`` and ``_quantizer.scale``) and its
bookkeeping: a cast writes its maximum into row 0 of the history, with or without gradients; leaving the outermost
autocast of a training pass makes new scales and rolls the history.  The casts are real roundings to
``torch.float8_e4m3fn``; the product is float32.  Gradients are not cast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor

__all__ = ["DelayedLinear", "StateManager"]

E4M3_MAX = 448.0
HISTORY = 4


class StateManager:
    """``FP8GlobalStateManager``: knows every history that a forward pass has touched."""

    states: list[SimpleNamespace]

    def __init__(self) -> None:
        self.states = []

    def reduce_and_update_fp8_tensors(self, forward: bool = True) -> None:
        for state in self.states if forward else []:
            largest = state.amax_history.amax(0)  # amax_compute_algo = max
            state.scale.copy_(torch.where(largest > 0, E4M3_MAX / largest, state.scale))
            state.amax_history.copy_(state.amax_history.roll(-1, 0))
            state.amax_history[0].zero_()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        yield
        if torch.is_grad_enabled():
            self.reduce_and_update_fp8_tensors(forward=True)


class DelayedLinear(torch.nn.Module):
    """``te.Linear`` under delayed scaling: input and weight are cast with scales from the past."""

    def __init__(self, size: int, manager: StateManager, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(0.002 * torch.randn(size, size, generator=generator))
        self.fp8_meta: dict[str, SimpleNamespace] = {}
        self.manager = manager

    def forward(self, x: Tensor) -> Tensor:
        if "scaling_fwd" not in self.fp8_meta:  # made by the first FP8 pass, as Transformer Engine does
            state = SimpleNamespace(scale=torch.ones(2), amax_history=torch.zeros(HISTORY, 2))
            self.fp8_meta["scaling_fwd"] = state
            self.manager.states.append(state)
        return self.cast(x, 0) @ self.cast(self.weight, 1).t()

    def cast(self, value: Tensor, index: int) -> Tensor:
        state = self.fp8_meta["scaling_fwd"]
        with torch.no_grad():
            row = state.amax_history[0]
            row[index] = torch.maximum(row[index], value.abs().max())
            scale = state.scale[index]
            rounded = (value * scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(value.dtype) / scale
        return value + (rounded - value).detach()
