"""The requests of one step, dealt to whoever has room: a fast engine takes more of them than a slow one.

Owners of engines are different processes on different nodes, so what has been dealt is counted in the job's key-value
store (c10d's).  Who samples a rollout changes nothing in it (:func:`megatron_rest.rollout.engine.rollout_seed`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist

from megatron_rest.rollout.engine import RolloutRequest

__all__ = ["Deal"]


class Deal:
    """Each request goes to one taker, and to another one if that gives it back.

    Args:
        store: that all takers reach; used by one thread of this process at a time.
        number: of the deal, the same on every rank and never used again.
        requests: all of them, the same on every rank; ``key`` is the position.
    """

    def __init__(self, store: dist.Store, number: int, requests: Sequence[RolloutRequest]) -> None:
        self._store = dist.PrefixStore(f"megatron_rest/deal/{number}", store)
        self._requests = requests
        self._next_is_known = 0  # least number of requests that have been dealt for the first time
        self._looked = 0  # requests given back that this taker has looked at

    def take(self, count: int) -> list[RolloutRequest]:
        """Up to ``count`` requests that nobody has; none if there are none just now."""
        keys = self._of_those_given_back(count)
        wanted, total = count - len(keys), len(self._requests)
        if wanted > 0 and self._next_is_known < total:
            self._next_is_known = self._store.add("next", wanted)
            keys += range(min(self._next_is_known - wanted, total), min(self._next_is_known, total))
        return [self._requests[key] for key in keys]

    def give_back(self, requests: Iterable[RolloutRequest]) -> None:
        """For others, or for later."""
        keys = [request.key for request in requests]
        first = self._store.add("slots", len(keys)) - len(keys)
        for slot, key in enumerate(keys, first):
            self._store.set(f"slot/{slot}", str(key))

    def num_left(self) -> int:
        """Requests that nobody has, or a few more: some may be on their way."""
        never = max(len(self._requests) - self._store.add("next", 0), 0)
        return never + self._store.add("slots", 0) - self._store.add("taken", 0)

    def _of_those_given_back(self, count: int) -> list[int]:
        keys: list[int] = []
        there = self._store.add("slots", 0)
        while len(keys) < count and self._looked < there and self._store.check([f"slot/{self._looked}"]):
            slot, self._looked = self._looked, self._looked + 1
            if self._store.add(f"taken/{slot}", 1) == 1:
                self._store.add("taken", 1)
                keys.append(int(self._store.get(f"slot/{slot}")))
        return keys
