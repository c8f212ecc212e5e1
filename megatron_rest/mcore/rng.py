"""State of every random stream of this process, as plain data a checkpoint can hold: one state a rank.

Nothing in an RL step draws from them (sampling has seeds of its own, dropout is off); whatever comes to draw from them
continues where it was.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["capture", "restore", "seed_host"]


def seed_host(seed: int, *, rank: int) -> None:
    """Python's and numpy's streams, which would begin with what the system calls random; others on every rank.

    Torch's and Megatron's are seeded with the groups (``mcore.cpu.seed_model_parallel``).
    """
    random.seed(f"{seed}/{rank}")
    np.random.seed(random.getrandbits(32))


def capture() -> dict[str, Any]:
    """Python's, numpy's and torch's generators, the GPU's, and Megatron's named streams (which differ between TP and EP
    ranks)."""
    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "algorithm": str(algorithm),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": {name: state.clone() for name, state in _tracker().get_states().items()},
    }


def restore(state: dict[str, Any]) -> None:
    """Undo :func:`capture`."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["algorithm"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    _tracker().set_states({name: value.clone() for name, value in state["megatron"].items()})


def _tracker() -> Any:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()
