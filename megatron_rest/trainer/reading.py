"""What is read in single rollouts, each by one rank, and known to all.

Parsing answers for the built-in reward and labelling every token is the host's longest work of a step, and the same on
every rank: so each rank reads an equal share of the tokens, and what it read travels, a byte a token and a line of JSON
a rollout.  Nothing is pickled, and a float arrives as it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.errors import RunError
from megatron_rest.types import RewardOutput

__all__ = ["Reading", "all_gather_bytes", "read_together", "share_of"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """Of one rollout of R tokens."""

    rule: RewardOutput | None  # the built-in reward's; None: it was not asked for
    static: float  # its total without the schedule
    regions: np.ndarray  # int8 [R]
    marks: np.ndarray | None  # uint8 [R], TurnMark; None: turns are not looked at
    num_calls: tuple[int, ...]  # of every turn, where a reward may speak of calls
    notices: tuple[str, ...] = ()  # for the log, on every rank


def share_of(lengths: Sequence[int], *, rank: int, world_size: int) -> list[int]:
    """Indices that ``rank`` reads: every rank about as many tokens, each index one rank's."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    places = range(len(order))
    mine = [i for i in places if _snake(i, world_size) == rank]
    return [order[place] for place in mine]


def read_together(lengths: Sequence[int], read: Callable[[int], Reading]) -> tuple[list[Reading], float]:
    """``read(i)`` of every rollout, the same on every rank, and the seconds that this rank read.

    Collectives (where there are several ranks): two all-gathers over all of them, sizes and bytes.  What fails on one
    rank ends all: there with its own error, elsewhere with a :class:`RunError` that has its words.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    started = time.perf_counter()
    mine = share_of(lengths, rank=rank, world_size=world)
    failure: Exception | None = None
    found: dict[int, Reading] = {}
    try:
        for i in mine:
            found[i] = read(i)
    except Exception as error:
        if world == 1:
            raise
        failure = error
    seconds = time.perf_counter() - started
    if world > 1:
        words = "" if failure is None else f"{type(failure).__name__}: {failure}"
        parts = all_gather_bytes(_pack(list(found.values()), words))
        if failure is not None:
            raise failure
        for other, part in enumerate(parts):
            if other != rank:
                theirs = share_of(lengths, rank=other, world_size=world)
                found |= dict(zip(theirs, _unpack(part, [lengths[i] for i in theirs], other), strict=True))
    return [found[i] for i in range(len(lengths))], seconds


def all_gather_bytes(mine: Tensor) -> list[Tensor]:
    """Every rank's uint8 ``[n]``, in rank order.  Collectives: two all-gathers over all ranks, sizes and bytes."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(mine)]))
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]


_ARRAYS = ("token_rewards", "is_rewarded")  # the built-in rule says nothing of single tokens


def _pack(readings: Sequence[Reading], failure: str) -> Tensor:
    """A line of JSON, then regions of all, then marks of all."""
    said = [[_plain(r.rule), r.static, list(r.num_calls), list(r.notices), r.marks is not None] for r in readings]
    head = json.dumps([failure, said]).encode() + b"\n"
    arrays = [r.regions.astype(np.int8, copy=False).view(np.uint8) for r in readings]
    arrays += [r.marks for r in readings if r.marks is not None]
    return torch.from_numpy(np.concatenate([np.frombuffer(head, np.uint8), *arrays]))


def _unpack(packed: Tensor, lengths: Sequence[int], rank: int) -> list[Reading]:
    data = packed.numpy()
    end = int(np.argmax(data == ord("\n"))) + 1
    failure, said = json.loads(data[:end].tobytes())
    if failure:
        raise RunError(f"rank {rank} could not judge what it was given: {failure}")
    bounds = np.cumsum([0, *lengths]) + end
    shift = int(bounds[-1]) - end
    return [
        Reading(
            rule=None if rule is None else RewardOutput(**rule | {"detail": tuple(rule["detail"])}),
            static=static,
            regions=data[begin:stop].view(np.int8),
            marks=data[begin + shift : stop + shift] if is_marked else None,
            num_calls=tuple(calls),
            notices=tuple(notices),
        )
        for (rule, static, calls, notices, is_marked), (begin, stop) in zip(
            said, pairwise(bounds.tolist()), strict=True
        )
    ]


def _plain(reward: RewardOutput | None) -> dict[str, Any] | None:
    if reward is None:
        return None
    assert reward.token_rewards is None and reward.is_rewarded is None, "the built-in rule speaks of whole answers"
    return {f.name: _copied(getattr(reward, f.name)) for f in fields(reward) if f.name not in _ARRAYS}


def _copied(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _snake(place: int, width: int) -> int:
    turn, column = divmod(place, width)
    return column if turn % 2 == 0 else width - 1 - column
