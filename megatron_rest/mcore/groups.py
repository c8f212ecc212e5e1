"""Process groups at a thousand ranks: each rank makes those it is in, and connects to those it talks to.

Megatron has every rank call ``new_group`` for every group of the job, one after the other: 5,553 times at 1,024 ranks
(TP 8 x PP 4 x DP 32).  A rank is in some forty of them.  Torch can make a group with its members alone
(``use_local_synchronization``), but names it after the number of groups that the process knows, and ranks of different
stages know different numbers: their names differ, and each waits for the other.  Here a group is named after its ranks
and how many groups of just these ranks there were before, which all its members know.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

__all__ = ["connect_on_demand", "own_groups_only"]

_made: Counter[tuple[int, ...]] = Counter()  # as long as the process lives: a name is never used again


def connect_on_demand() -> None:
    """Let gloo open a connection when two ranks first talk; else each group of n ranks costs each of them n - 1.

    Call it before torch.distributed starts; a choice that is already made is kept.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


@contextmanager
def own_groups_only() -> Iterator[None]:
    """While it lasts, Megatron makes the groups that this rank is in; nothing changes where torch has other names."""
    from megatron.core import parallel_state

    if not hasattr(c10d, "_hash_ranks_to_str"):
        yield
        return
    make, name = parallel_state.create_group, c10d._hash_ranks_to_str

    def make_own(ranks: Any = None, **options: Any) -> Any:
        if ranks is not None and dist.get_rank() not in ranks:
            return None
        return make(ranks, **(options | {"use_local_synchronization": ranks is not None}))

    def name_of(ranks: list[int]) -> str:
        key = tuple(ranks)
        _made[key] += 1
        text = f"megatron_rest {'_'.join(map(str, key))} {_made[key]}"
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    parallel_state.create_group = make_own
    c10d._hash_ranks_to_str = name_of
    try:
        yield
    finally:
        parallel_state.create_group = make
        c10d._hash_ranks_to_str = name
