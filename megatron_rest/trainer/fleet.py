"""The engines of all ranks as one: who samples what, weights into all of them, and what happens when one goes.

    plan(prompts, seed)       what comes behind all that is planned already
    begin()                   engines in processes of their own are dealt what is planned, one by one and in its order
                              (deal.py), in a thread of their owner's; engines inside the ranks have a fixed share,
                              sampled by settle()
    settle(refresh)           wait for all of the oldest prompts; what a lost engine had goes back to the deal, its
                              successor starts meanwhile and gets the present weights, alone, as soon as it is there.
                              What runs for later prompts then ends, too (rollout.on_update wait), or is cut (keep)
                              and goes on after the next begin().  All that was sampled is on all ranks
    take()                    the oldest prompts with their rollouts
    examine(prompts, exam)    the same with one greedy answer a prompt, while no rollouts are under way
    deliver(version, canary)  weights into every engine that has started, verified; one that is lost on the way is
                              started again and joins in when it is ready, the others get all again
    admit(version)            what the canary said is fine: those engines may sample

Every public method that says so is collective: the ranks agree after each attempt, so they all go on, or all raise.
A rollout is kept under its key as soon as it is complete: what a lost engine had handed over is not sampled again, what
it had not is sampled by another one, and nothing is counted twice.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rest.config import ConfigError, OnUpdate, RolloutConfig
from megatron_rest.mcore.build import ParallelContext
from megatron_rest.rollout.engine import (
    NO_WEIGHTS,
    Cut,
    EngineLostError,
    Exam,
    RolloutEngine,
    RolloutRequest,
    as_groups,
    make_requests,
)
from megatron_rest.rollout.remote import RemoteEngine
from megatron_rest.trainer.deal import Deal
from megatron_rest.trainer.exchange import all_gather_rollouts
from megatron_rest.trainer.station import Station
from megatron_rest.types import PromptSample, Rollout, RolloutGroup
from megatron_rest.weight_sync.sync import SyncReport, WeightSync, WeightSyncError
from megatron_rest.weight_sync.transport import EngineUnreachableError

__all__ = ["EngineFleet", "Placement", "Singers", "engine_devices"]

_T = TypeVar("_T")

_deal_numbers = itertools.count(1)  # of all fleets of this process: the store is one; the same on every rank

_log = logging.getLogger(__name__)

_LEAST_PAUSE, _PAUSE = 0.002, 0.1  # seconds between looks of the ranks at each other
_AHEAD = 1.25  # requests an engine has, to those that it samples at once: there is always one that waits
_AHEAD_WITH_TOOLS = 4.0  # where most of them may wait for a tool
_LEVEL = 0.1  # of the shares is equal: noise of the speeds must not add up over the steps


@dataclass(frozen=True, slots=True)
class Singers:
    """Engines that have just been given weights, as one rank sees them."""

    engine: RolloutEngine | None  # this rank's, if it is one of them
    has_first: bool  # it is the first of them, or a part of it
    first_rank: int  # owner of the first


class _NobodyReadyError(Exception):
    """No engine waits for weights any more."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which ranks have which engine."""

    members: tuple[tuple[int, ...], ...]  # ranks of each engine: its owner, or all that hold a part of it; rank 0 first

    @property
    def owners(self) -> tuple[int, ...]:
        """The rank of each engine that hands its rollouts over."""
        return tuple(ranks[0] for ranks in self.members)

    @classmethod
    def of(cls, config: RolloutConfig, world_size: int) -> Placement:
        """Colocated (``rollout.replicas`` 0): an engine in every rank, or over every ``tensor_parallel`` ranks in a
        row, which lie in one node as those of Megatron's TP groups do.  Else replicas spread evenly over the ranks, so
        over nodes.
        """
        if config.replicas:
            return cls(tuple((i * world_size // config.replicas,) for i in range(config.replicas)))
        size = config.tensor_parallel
        return cls(tuple(tuple(range(first, first + size)) for first in range(0, world_size, size)))

    def engine_of(self, rank: int) -> int | None:
        """Index of the engine that ``rank`` has, or has a part of."""
        return next((i for i, ranks in enumerate(self.members) if rank in ranks), None)


def engine_devices(context: ParallelContext, config: RolloutConfig, placement: Placement, index: int) -> str | None:
    """GPUs of engine ``index``, by their numbers among those that its owner sees: behind those of the ranks there.

    None on CPU.  Raises ConfigError when the node has too few.
    """
    if context.device.type == "cpu":
        return None
    node = context.rank // context.ranks_per_node
    before = sum(owner // context.ranks_per_node == node for owner in placement.owners[:index])
    first = context.ranks_per_node + before * config.tensor_parallel
    last = first + config.tensor_parallel
    if last > torch.cuda.device_count():
        raise ConfigError(
            f"rollout.replicas {config.replicas} x rollout.tensor_parallel {config.tensor_parallel}: engine {index} "
            f"would take GPUs {first} to {last - 1}, and its node has {torch.cuda.device_count()} of which the ranks "
            f"use {context.ranks_per_node}: start fewer ranks a node or use fewer replicas"
        )
    return ",".join(str(i) for i in range(first, last))


class EngineFleet:
    """This rank's engine, if it has one, and the agreement with the other ranks.

    Args:
        engine: None on ranks without one.
        placement: the same on every rank.
        rank: this rank.
        config: group size, limits.
        connect: makes the transfer, to this rank's engine or (False) without it; called on every rank together, again
            whenever other engines take part.
    """

    def __init__(
        self,
        engine: RolloutEngine | None,
        *,
        placement: Placement,
        rank: int,
        config: RolloutConfig,
        connect: Callable[[bool], WeightSync],
    ) -> None:
        self.engine = engine
        self.placement = placement
        self.version = NO_WEIGHTS
        """Policy version that all engines were given last."""
        self.num_restarts = 0
        """Engines started again so far, of all ranks."""
        self._index = placement.engine_of(rank)
        self._hands_over = rank in placement.owners
        self._is_first_rank = rank == 0
        self._config = config
        self._connect = connect
        self._station: Station | None = None
        if isinstance(engine, RemoteEngine):
            self._station = Station(engine, max_restarts=config.max_restarts)
        self._restarts_before = 0
        self._sync: WeightSync | None = None
        self._connected: tuple[tuple[int, ...], tuple[int, ...]] = (), ()  # engines, and which life of each
        self._delivered: tuple[int, ...] = ()  # engines that took the last transfer
        self._serving: tuple[int, ...] = ()  # of those to all engines
        self._share: _FixedShare | _DealtShare | None = None
        self._plan: list[_Batch] = []
        self._store: dist.Store | None = None
        self._speeds = [1.0] * len(placement.owners)  # tokens a second of each engine, in the last step
        self._paces = [0.0] * len(placement.owners)  # seconds a token of one rollout, from its deal to its end

    @property
    def num_engines(self) -> int:
        """Engines that took the last transfer to all."""
        return len(self._serving)

    @property
    def is_begun(self) -> bool:
        """Whether rollouts are under way or waiting to be settled."""
        return self._share is not None

    @property
    def num_planned(self) -> int:
        """Plans that have not been taken."""
        return len(self._plan)

    @property
    def can_settle(self) -> bool:
        """Whether the oldest prompts' rollouts are under way, or all there."""
        return self.is_begun or bool(self._plan and self._plan[0].is_whole)

    def continue_count(self, num_restarts: int) -> None:
        """Engines that were started again before this start of the run."""
        self._restarts_before = self.num_restarts = num_restarts

    def plan(self, prompts: Sequence[PromptSample], *, seed: int, known: Mapping[int, Rollout] | None = None) -> None:
        """Sample ``prompts`` behind what is planned; ``known`` are rollouts of theirs that are there, or cut, by their
        keys.  The same on every rank."""
        requests = make_requests(prompts, rollouts_per_prompt=self._config.rollouts_per_prompt, seed=seed)
        self._plan.append(_Batch(requests, self._config.rollouts_per_prompt, dict(known or {})))

    def begin(self) -> None:
        """Start this rank's part of what is planned.  On every rank, though nobody waits for another one."""
        self._begin(_Work.of(self._plan, self._config.max_response_tokens, exam=None))

    def examine(
        self, prompts: Sequence[PromptSample], exam: Exam, *, max_response_tokens: int, refresh: Callable[[], object]
    ) -> list[RolloutGroup]:
        """One greedy answer to every prompt, in their order, on every rank.  Collective; as :meth:`settle`.

        The engines hold the present weights, and no rollouts are under way.
        """
        assert not self.is_begun, "the engines are busy with rollouts"
        batch = _Batch(make_requests(prompts, rollouts_per_prompt=1, seed=0), 1, {})
        self._begin(_Work.of([batch], max_response_tokens, exam=exam))
        self.settle(refresh)
        return batch.groups()

    def _begin(self, work: _Work) -> None:
        if not work.requests:
            return
        if not self._config.replicas:
            num_engines = len(self.placement.owners)
            mine = [r for r in work.requests if (r.key // work.group_size) % num_engines == self._index]
            self._share = _FixedShare(work, self.engine, mine)
            return
        if self._store is None:  # a connection of its own: the main thread may block in the other one
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()
        deal = Deal(self._store, next(_deal_numbers), work.requests)
        window = self._window(work.num_of_step, work.exam)
        is_cut = self._config.on_update is OnUpdate.KEEP and work.exam is None
        reserve = 0 if work.exam is not None else self._reserve()
        self._share = _DealtShare(work, deal, self._station, window=window, reserve=reserve, is_cut=is_cut)
        self._share.start()

    def _window(self, total: int, exam: Exam | None) -> int:
        """Requests that this rank's engine has at the same time: as many as keep it busy, and not more of them than
        its part of a step by the speed that it showed."""
        if self._index is None:
            return 0
        environment = self._config.environment if exam is None else exam.environment
        most = self._config.max_concurrent * (_AHEAD_WITH_TOOLS if environment else _AHEAD)
        part = total * self._speeds[self._index] / sum(self._speeds[i] for i in self._serving)
        return math.ceil(min(most, max(part, 1.0)))

    def _reserve(self) -> int:
        """Requests that this rank's engine leaves to faster ones when no more are left.

        A rollout of m tokens dealt to engine i ends after m p_i seconds.  Until then a faster engine j, of r_j tokens a
        second, could begin r_j (p_i - p_j) others, one after another, and end each of them sooner.
        """
        if self._index is None:
            return 0
        mine = self._paces[self._index]
        return int(sum(self._speeds[j] * max(mine - self._paces[j], 0.0) for j in self._serving))

    def collect(self, refresh: Callable[[], object]) -> list[RolloutGroup]:
        """:meth:`settle`, then :meth:`take`."""
        self.settle(refresh)
        return self.take()

    def take(self) -> list[RolloutGroup]:
        """The oldest prompts with their rollouts, which are settled; the plan goes on behind them."""
        return self._plan.pop(0).groups()

    def known(self) -> list[Mapping[int, Rollout]]:
        """Rollouts that are there, or cut, of each plan, by their keys; the same on every rank when nothing is under
        way."""
        return [batch.known for batch in self._plan]

    def settle(self, refresh: Callable[[], object]) -> None:
        """Return when the oldest prompts have all their rollouts and no engine samples.  Collective.

        ``refresh`` gives the present weights to engines that have none (:meth:`deliver`).  Raises EngineLostError on
        every rank after more than ``rollout.max_restarts`` losses in a row of one engine.
        """
        share = self._share
        if share is None:
            assert self._plan and self._plan[0].is_whole, "begin() comes first"
            return
        if isinstance(share, _FixedShare):
            share.sample()
        else:
            self._wait_for(share, refresh)
        self._share = None
        prompt_ids = [request.prompt.prompt_id for request in share.work.requests]
        share.work.note(all_gather_rollouts(share.done if self._hands_over else {}, prompt_ids))

    def _wait_for(self, share: _DealtShare, refresh: Callable[[], object]) -> None:
        """Until all ranks together have all rollouts of the oldest prompts, and their engines have stopped."""
        pause = _LEAST_PAUSE
        while True:
            station = self._station
            state = self._agree(
                done=share.num_awaited,
                failed=share.error is not None,
                waiting=station is not None and station.is_waiting,
                serving=station is not None and station.is_serving,
                left=share.deal.num_left() if self._is_first_rank else 0,
            )
            if state["failed"]:
                share.over.set()
                raise share.error or EngineLostError("the engine of another rank failed: that rank says how")
            if state["done"] == share.work.num_awaited:
                break
            if state["serving"] < len(self._serving):  # the faster one may be the lost one
                share.reserve = 0
            if state["waiting"] and (state["left"] or not state["serving"]):
                try:
                    refresh()
                except _NobodyReadyError:
                    _log.warning("an engine that had just started is gone before it was given weights")
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        share.finish()
        if self._agree(failed=share.error is not None)["failed"]:
            raise share.error or EngineLostError("the engine of another rank failed: that rank says how")
        if self._station is not None and self._station.is_serving:
            self._station.praise()
        if share.work.exam is None:
            self._note_speeds(share)

    def _note_speeds(self, share: _DealtShare) -> None:
        found = torch.zeros(2, len(self._speeds), dtype=torch.float64)
        if self._index is not None:
            found[:, self._index] = torch.tensor([share.speed(), share.pace()])
        dist.all_reduce(found)
        if found[0].any():  # no token of a step was sampled where every environment failed: what was known stays
            self._speeds, self._paces = (_levelled(values) for values in found.tolist())

    def deliver(self, version: int, canary: Callable[[Singers], _T | None]) -> tuple[SyncReport, _T]:
        """Weights of ``version`` into the engines, then the canary; what the transfer and the canary say.

        While rollouts are collected only engines without weights get them, and the others go on; else all that have
        started.  Collective; ``canary`` is, too, and returns None on every rank when an engine was lost under it.
        Raises WeightSyncError on every rank when a transfer fails otherwise than by a lost engine, and EngineLostError
        after more than ``rollout.max_restarts`` losses in a row of one engine.
        """
        if self.engine is not None:
            self.engine.wake_up()
        is_refresh = self.is_begun
        if not is_refresh:
            self.version = NO_WEIGHTS
            if self._station is not None:
                self._station.is_serving = False
        while True:
            members = self._members_of_transfer(only_new=is_refresh)
            report, error = self._push(version, members)
            lost, num_failed = self._lost_in_transfer(error, members)
            if not num_failed:
                assert report is not None
                song = canary(self._singers(members))
                if song is not None:
                    break
                lost, _ = self._lost_in_transfer(None, members)
            elif not lost:
                raise error or WeightSyncError("the transfer failed in another data-parallel replica")
            if self._station is not None and self._index in lost:
                reason = error or EngineLostError("this rank's engine was lost or half loaded in a transfer")
                self._station.lose(reason, f"taking weights of version {version}")
        self._delivered = members
        return report, song

    def admit(self, version: int) -> None:
        """The engines of the last :meth:`deliver` hold what they should, and may sample.  On every rank."""
        if self._station is not None and self._index in self._delivered:
            self._station.is_serving = True
            if not self.is_begun:
                self._station.praise()
        if not self.is_begun:
            self.version, self._serving = version, self._delivered

    def engine_arguments(self) -> dict[str, object]:
        """What this rank's engine was made with; empty without one, or if it is lost just now."""
        if self.engine is None or (self._station is not None and not self._station.is_ready):
            return {}
        try:
            return self.engine.arguments()
        except EngineLostError:
            return {}

    def sleep(self) -> None:
        """Engines give their GPU memory back until the next :meth:`deliver`."""
        if self.engine is not None:
            self.engine.sleep()

    def close(self) -> None:
        """End this rank's engine."""
        if self.engine is not None:
            self.engine.close()

    def _members_of_transfer(self, *, only_new: bool) -> tuple[int, ...]:
        """Engines that take the next transfer.  Collective.

        All of them wait for the first transfer of the run; later whoever is ready gets weights, and a successor that
        still starts joins in later.  Raises EngineLostError on every rank when an engine cannot be made good, and
        _NobodyReadyError, with ``only_new``, when there is none.
        """
        everybody = tuple(range(len(self.placement.owners)))
        if self._station is None and not self._config.replicas:
            return everybody
        while True:
            station, ready = self._station, [0] * len(everybody)
            if station is not None and self._index is not None:
                if not (only_new and station.is_serving):
                    station.look()
                is_member = station.is_waiting if only_new else station.is_ready
                ready[self._index] = 1 + station.num_restarts if is_member else 0
            state = self._agree(
                failed=station is not None and station.error is not None, **{str(i): r for i, r in enumerate(ready)}
            )
            if state["failed"]:
                error = None if station is None else station.error
                raise error or EngineLostError("the engine of another rank was lost too often: that rank says how")
            members = tuple(i for i in everybody if state[str(i)])
            if members if only_new or self._serving else len(members) == len(everybody):
                lives = tuple(state[str(i)] for i in members)
                if (members, lives) != self._connected:
                    self._disconnect()
                    self._connected = members, lives
                return members
            if only_new:
                raise _NobodyReadyError
            time.sleep(_PAUSE)

    def _push(self, version: int, members: tuple[int, ...]) -> tuple[SyncReport | None, Exception | None]:
        """Connect if need be and push.  A rank that could not connect lets the others know before they would wait."""
        if self._sync is None:
            sync, error = None, None
            try:
                sync = self._connect(self.engine is not None and self._index in members)
            except Exception as failure:  # noqa: BLE001  raised by deliver() after all ranks have agreed
                error = failure
            if self._agree(failed=error is not None)["failed"]:
                if sync is not None:
                    sync.close()
                return None, error or WeightSyncError("another rank could not connect to its engine")
            self._sync = sync
        assert self._sync is not None
        try:
            return self._sync.push(version), None
        except WeightSyncError as error:
            return None, error

    def _disconnect(self) -> None:
        if self._sync is not None:
            self._sync.close()
        self._sync = None

    def _lost_in_transfer(self, error: Exception | None, members: Sequence[int]) -> tuple[list[int], int]:
        """Engines that must be replaced, and how many ranks failed.  Collective.

        An engine is lost when its process is gone, when it broke while loading, and when the link of any rank to it
        broke: then it may be half loaded.
        """
        blamed = set()
        if isinstance(error, WeightSyncError | EngineUnreachableError):
            blamed = {members[position] for position in error.engines}
        if self._station is not None and self._index is not None and self._index in members:
            broke = isinstance(error, WeightSyncError) and error.__cause__ is not None
            if broke or not self._station.engine.is_alive:
                blamed.add(self._index)
        votes = {str(i): i in blamed for i in range(len(self.placement.owners))}
        state = self._agree(failed=error is not None, **votes)
        lost = [i for i in range(len(votes)) if state[str(i)]] if self._config.replicas else []
        if lost or state["failed"]:
            self._disconnect()
        return lost, state["failed"]

    def _singers(self, members: Sequence[int]) -> Singers:
        engine = self.engine if self._index in members else None
        return Singers(engine, self._index == members[0], self.placement.owners[members[0]])

    def _agree(self, **values: int) -> dict[str, int]:
        """Sums over all ranks; one all-reduce of a few integers.  Counts restarts by the way."""
        restarts = 0 if self._station is None else self._station.num_restarts
        total = torch.tensor([restarts, *map(int, values.values())], dtype=torch.int64)
        dist.all_reduce(total)
        self.num_restarts = self._restarts_before + int(total[0])
        return dict(zip(values, total[1:].tolist(), strict=True))


def _levelled(values: Sequence[float]) -> list[float]:
    """Of an engine that has sampled nothing (0) what the others have on average; the rest drawn near to that."""
    measured = [value for value in values if value > 0]
    usual = sum(measured) / len(measured)
    return [(1 - _LEVEL) * (value or usual) + _LEVEL * usual for value in values]


@dataclass(frozen=True, slots=True)
class _Batch:
    """The prompts of a step, and what is there of their rollouts."""

    requests: Sequence[RolloutRequest]
    group_size: int
    known: dict[int, Rollout]  # by the requests' keys; some may be cut

    @property
    def is_whole(self) -> bool:
        return len(self.known) == len(self.requests) and all(rollout.is_whole for rollout in self.known.values())

    def groups(self) -> list[RolloutGroup]:
        assert self.is_whole, "its rollouts are not settled"
        return as_groups(self.requests, self.known, self.group_size)


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be sampled until the next weights come, by all engines together."""

    requests: Sequence[RolloutRequest]  # in the order in which they are dealt; keys are the places in it
    num_awaited: int  # the first so many are those of the oldest prompts
    num_of_step: int  # rollouts of these, whether they are there or not
    max_response_tokens: int
    exam: Exam | None
    group_size: int
    _places: Sequence[tuple[_Batch, int]] = field(repr=False)  # whose each request is, and its key there

    @classmethod
    def of(cls, batches: Sequence[_Batch], max_response_tokens: int, *, exam: Exam | None) -> _Work:
        """All that is not there yet."""
        places = [
            (batch, request)
            for batch in batches
            for request in batch.requests
            if request.key not in batch.known or not batch.known[request.key].is_whole
        ]
        return cls(
            [replace(r, key=key, begun=b.known.get(r.key)) for key, (b, r) in enumerate(places)],
            sum(batch is batches[0] for batch, _ in places),
            len(batches[0].requests) if batches else 0,
            max_response_tokens,
            exam,
            batches[0].group_size if batches else 1,
            [(batch, request.key) for batch, request in places],
        )

    def note(self, rollouts: Mapping[int, Rollout]) -> None:
        """What has been sampled, by key."""
        for key, rollout in rollouts.items():
            batch, own_key = self._places[key]
            batch.known[own_key] = rollout


class _FixedShare:
    """The rollouts of an engine inside this rank's process: every so manieth prompt.

    The ranks of an engine that lies over several must ask it the same.
    """

    def __init__(self, work: _Work, engine: RolloutEngine | None, mine: Sequence[RolloutRequest]) -> None:
        self.work = work
        self.done: dict[int, Rollout] = {}
        self._engine, self._mine = engine, mine

    def sample(self) -> None:
        if self._engine is not None and self._mine:
            self._engine.run(
                self._mine,
                max_response_tokens=self.work.max_response_tokens,
                on_rollout=self.done.__setitem__,
                exam=self.work.exam,
            )


class _DealtShare:
    """The rollouts that this rank's engine process is dealt; none on a rank without one."""

    def __init__(
        self, work: _Work, deal: Deal, station: Station | None, *, window: int, reserve: int, is_cut: bool
    ) -> None:
        self.work = work
        self.deal = deal
        self.reserve = reserve
        """Requests that are left to faster engines."""
        self.done: dict[int, Rollout] = {}
        self.num_awaited = 0
        """Rollouts of the oldest prompts among them."""
        self._station = station
        self._window = window
        self._is_cut = is_cut
        self._taken: dict[int, RolloutRequest] = {}  # of the engine's present life
        self.over = threading.Event()
        """Nothing more is wanted."""
        self._error: Exception | None = None
        self._num_begun = 0  # tokens of what it was handed over that older weights had sampled
        self._dealt: dict[int, float] = {}  # when each was taken
        self._seconds = 0.0  # from the deal to the end, of all that it has done
        self._began = time.monotonic()
        self._last = self._began  # when the last rollout came
        self._thread = threading.Thread(target=self._serve, name="rollouts", daemon=True)

    @property
    def error(self) -> Exception | None:
        """What ends the run."""
        return self._error or (None if self._station is None else self._station.error)

    def start(self) -> None:
        if self._station is not None:
            self._thread.start()

    def finish(self) -> None:
        """When all ranks together have what they wait for: return when this rank's engine has stopped."""
        self.over.set()
        if self._station is not None:
            self._thread.join()

    def speed(self) -> float:
        """Tokens a second of this rank's engine in this step; 0 if it sampled none."""
        return self._num_tokens() / max(self._last - self._began, 1e-3)

    def pace(self) -> float:
        """Seconds a token of one of its rollouts, from the deal to the end; 0 if it sampled none."""
        return self._seconds / max(self._num_tokens(), 1)

    def _num_tokens(self) -> int:
        return sum(int(rollout.loss_mask.sum()) for rollout in self.done.values()) - self._num_begun

    def _serve(self) -> None:
        station = self._station
        assert station is not None
        try:
            while not self.over.is_set() and station.error is None:
                requests = self._take() if station.is_serving else []
                if not requests:
                    self.over.wait(_PAUSE)
                    continue
                try:
                    station.engine.run(
                        requests,
                        max_response_tokens=self.work.max_response_tokens,
                        on_rollout=self._keep,
                        exam=self.work.exam,
                        more=self._more,
                    )
                except EngineLostError as error:
                    self.deal.give_back(self._taken.values())
                    _log.warning("%d rollouts go to other engines or to its successor", len(self._taken))
                    self._taken.clear()
                    station.lose(error, "sampling")
        except Exception as error:  # noqa: BLE001  carried to the thread that waits
            self._error = error

    def _keep(self, key: int, rollout: Rollout) -> None:
        begun = self._taken.pop(key).begun
        self._num_begun += 0 if begun is None else len(begun.token_ids)
        self._last = time.monotonic()
        self._seconds += self._last - self._dealt.pop(key)
        self.done[key] = rollout
        self.num_awaited += key < self.work.num_awaited

    def _take(self) -> list[RolloutRequest]:
        wanted = self._window - len(self._taken)
        if self.reserve:
            wanted = min(wanted, self.deal.num_left() - self.reserve)
        requests = self.deal.take(wanted) if wanted > 0 else []
        self._taken |= {request.key: request for request in requests}
        self._dealt |= dict.fromkeys((request.key for request in requests), time.monotonic())
        return requests

    def _more(self) -> Sequence[RolloutRequest] | Cut | None:
        if self.over.is_set():
            return Cut.NOW if self._is_cut else None
        if len(self._taken) >= self._window:
            return ()
        # Open as long as something runs: a cut has to reach it, and what a lost engine had may come.
        return self._take() or (() if self._taken else None)
