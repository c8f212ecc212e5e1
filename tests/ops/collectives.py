"""Count the collectives that a piece of code issues, by name, through every public function of torch.distributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def count_collectives() -> Iterator[Counter[str]]:
    """``with count_collectives() as calls: ...``  Renamed collectives count under their new name."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[_NEW_NAMES.get(name, name)] += 1
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(dist, name, counted(name, original))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
