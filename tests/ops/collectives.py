"""Count the collectives that a piece of code issues, and their bytes, through the functions of torch.distributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "recv",
)
_NEW_NAMES = {"all_gather_into_tensor": "all_gather_single", "reduce_scatter_tensor": "reduce_scatter_single"}


class Calls(Counter[str]):
    """Calls by name; renamed collectives count under their new name."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()  # bytes of the tensor that this rank contributes, by name


@contextmanager
def count_collectives() -> Iterator[Calls]:
    """``with count_collectives() as calls: ...``"""
    calls = Calls()
    originals = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}

    def counted(old_name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            name = _NEW_NAMES.get(old_name, old_name)
            calls[name] += 1
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]  # (out, in) or one that is both
            calls.payload[name] += tensors[-1].nbytes if tensors else 0
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(dist, name, counted(name, original))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
