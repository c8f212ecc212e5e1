"""Seconds of a weight transfer, event by event: the real plans, with the windows, lanes and order of the code that
carries them.

A sender issues its messages in order while at most :data:`MESSAGES_UNDER_WAY` are unfinished from the oldest on; a
worker asks for as many ahead of the one it handles.  Over NCCL a message also waits for the one before it in its lane
at either end (:class:`~megatron_rest.weight_sync.links.Lanes`).  Messages that move share the two cards evenly.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_rest.config import ConfigError, RestConfig, RolloutQuantization
from megatron_rest.model_map import ModelShape
from megatron_rest.weight_sync.layouts import (
    EngineLayout,
    EngineTensor,
    Fp8Form,
    TrainingLayout,
    engine_tensors,
    engine_workers,
    training_shards,
)
from megatron_rest.weight_sync.limits import MESSAGES_UNDER_WAY
from megatron_rest.weight_sync.links import NCCL_LANES, Lanes
from megatron_rest.weight_sync.plan import SyncPlan, make_plans, without_collector
from megatron_rest.weight_sync.rates import RATES, Rates

__all__ = ["Transfer", "simulate_push", "simulate_transfer", "transfer_seconds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """One push into all engines."""

    seconds: float
    limit: float  # of the most loaded card
    plan_seconds: float  # CPU time of all plans, which every rank makes
    messages: float  # a worker
    result_bytes: int  # that every rank receives to compare digests
    ranks_of_a_group: int  # of an engine's transfer group, its workers included
    groups_of_a_rank: int
    imbalance: float  # bytes of the busiest sender over the mean
    moved: int
    needed: int

    @property
    def share(self) -> float:
        """Of the line rate."""
        return self.limit / self.seconds


def simulate_push(config: RestConfig, shape: ModelShape, *, world_size: int) -> Transfer:
    """Of ``world_size`` training ranks and this configuration's engines, which have GPUs of their own.

    Raises ConfigError when a layout cuts through a head, a row or a block.
    """
    p = config.parallel
    training = TrainingLayout(
        tensor_parallel=p.tensor_parallel,
        pipeline_parallel=p.pipeline_parallel,
        virtual_pipeline=p.virtual_pipeline,
        data_parallel=p.data_parallel(world_size) * p.context_parallel,
        expert_parallel=p.expert_parallel,
    )
    try:
        return simulate_transfer(
            shape,
            training,
            EngineLayout(tensor_parallel=config.rollout.tensor_parallel),
            config.rollout.replicas,
            message_bytes=config.weight_sync.bucket_bytes,
            quantization=config.rollout.quantization,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def simulate_transfer(
    shape: ModelShape,
    training: TrainingLayout,
    engine: EngineLayout,
    num_engines: int,
    *,
    message_bytes: int,
    quantization: RolloutQuantization = RolloutQuantization.NONE,
    rates: Rates = RATES,
) -> Transfer:
    """Engines laid out alike, in bfloat16 or with the layers' matrices in FP8; ranks as Megatron orders them."""
    held = training_shards(shape, training)
    began = time.process_time()
    with without_collector():
        workers = engine_workers(shape, engine)
        form = _form([engine_tensors(shape, worker, torch.bfloat16) for worker in workers], quantization)
        tensors = [engine_tensors(shape, worker, torch.bfloat16, form) for worker in workers]
        plans = make_plans(shape, held, [(tensors, form)] * num_engines, message_bytes=message_bytes)
    plan_seconds = time.process_time() - began
    sent = [sum(of_rank) for of_rank in zip(*(plan.sent_by for plan in plans), strict=True)]
    into = max(max(plan.received_by()) for plan in plans)
    groups = [sum(rank in plan.sources for plan in plans) for rank in plans[0].sources]
    return Transfer(
        seconds=max(transfer_seconds(part, rates=rates) for part in _apart(plans)),
        limit=max(into, *sent) / rates.nic,
        plan_seconds=plan_seconds,
        messages=len(plans[0].messages) / len(tensors),
        result_bytes=_result_bytes(plans, len(held)),
        ranks_of_a_group=max(len(plan.sources) + len(tensors) for plan in plans),
        groups_of_a_rank=max(groups),
        imbalance=max(sent) * sum(n > 0 for n in sent) / sum(sent),
        moved=sum(plan.moved_bytes for plan in plans),
        needed=sum(plan.needed_bytes for plan in plans),
    )


def _form(tables: Sequence[Sequence[EngineTensor]], quantization: RolloutQuantization) -> Fp8Form | None:
    """What vLLM's online quantisation holds in FP8: matrices of layers, but for the routers."""
    if quantization is RolloutQuantization.NONE:
        return None
    held = (t for table in tables for t in table if len(t.shape) > 1 and ".layers." in t.name)
    names = frozenset(p.hf_name for t in held for p in t.placements if not p.hf_name.endswith(".gate.weight"))
    is_block = quantization is RolloutQuantization.FP8_BLOCK
    return Fp8Form(names=names, scale_suffix="_scale", block=(128, 128) if is_block else (1, None))


_FOLD_BYTES = 24  # of a pickled (engine, worker) and its digest
_REPLICA_BYTES = 80  # of a pickled name of a replicated parameter and its digest


def _result_bytes(plans: Sequence[SyncPlan], num_ranks: int) -> int:
    """Results of all ranks, each padded to the largest, which is an owner's: what its engine received and it sent."""
    received = max(len(plan.pairs()) for plan in plans)
    sent = max(sum(pair[0] == rank for plan in plans for pair in plan.pairs()) for rank in plans[0].sources[:1])
    norms = max(len({t.name for t in plan.tensors[0] if len(t.shape) == 1}) for plan in plans)
    return num_ranks * ((received + sent) * _FOLD_BYTES + norms * _REPLICA_BYTES)


def _apart(plans: Sequence[SyncPlan]) -> list[list[SyncPlan]]:
    """Plans that share senders, together; of those that are alike but for who sends, one."""
    together: list[tuple[set[int], list[SyncPlan]]] = []
    for plan in plans:
        ranks, members = set(plan.sources), [plan]
        for other in [entry for entry in together if entry[0] & ranks]:
            together.remove(other)
            ranks |= other[0]
            members = other[1] + members
        together.append((ranks, members))
    different: dict[tuple[int, int], list[SyncPlan]] = {}
    for ranks, members in together:
        different.setdefault((len(ranks), len(members)), members)
    return list(different.values())


@dataclass(slots=True)
class _Message:
    source: int
    worker: tuple[int, int]  # engine, its worker
    left: float  # bytes
    send: float  # seconds of the sender's host
    receive: float
    lanes: tuple[tuple[int, ...], tuple[int, ...]]  # of its sender and of its worker
    is_issued: bool = False
    is_asked: bool = False
    is_moving: bool = False
    is_done: bool = False
    rate: float = 0.0
    since: float = 0.0
    version: int = 0


@dataclass(slots=True)
class _Sender:
    order: list[int]
    next: int = 0
    oldest: int = 0
    free: float = 0.0
    moving: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Worker:
    order: list[int]
    next: int = 0
    arrived: int = 0  # in order
    handled: int = 0
    free: float = 0.0
    moving: set[int] = field(default_factory=set)


def transfer_seconds(plans: Sequence[SyncPlan], *, lanes: int = NCCL_LANES, rates: Rates = RATES) -> float:
    """Until the last worker has handled its last message; ``lanes`` 0: messages wait for nothing but windows (gloo)."""
    return _Run(plans, lanes, rates).seconds()


class _Run:
    """State of one simulation."""

    def __init__(self, plans: Sequence[SyncPlan], lanes: int, rates: Rates) -> None:
        self._rates = rates
        self._messages: list[_Message] = []
        self._senders: dict[int, _Sender] = {}
        self._workers: dict[tuple[int, int], _Worker] = {}
        self._queues: dict[tuple[int, ...], deque[int]] = {}  # of every lane at every end
        self._events: list[tuple[float, int, str, int, int]] = []
        self._count = itertools.count()
        entries = []
        for engine, plan in enumerate(plans):
            place = {rank: i for i, rank in enumerate(plan.sources)}
            ends = {i: Lanes(i, max(lanes, 1)) for i in place.values()}
            for position, message in enumerate(plan.messages):
                lane = ends[place[message.source]].next(len(place) + message.worker)
                entries.append((position, engine, message, lane if lanes else position))
        for _, engine, message, lane in sorted(entries, key=lambda entry: entry[:2]):
            packed = rates.copy * len(message.copies) if len(message.copies) > 1 else 0.0
            index, worker = len(self._messages), (engine, message.worker)
            at = (0, engine, message.source, lane), (1, engine, message.worker, lane)
            self._messages.append(
                _Message(
                    source=message.source,
                    worker=worker,
                    left=float(message.num_bytes),
                    send=rates.send + packed,
                    receive=rates.receive + packed,
                    lanes=at,
                )
            )
            self._senders.setdefault(message.source, _Sender([])).order.append(index)
            self._workers.setdefault(worker, _Worker([])).order.append(index)
            for end in at:
                self._queues.setdefault(end, deque()).append(index)

    def seconds(self) -> float:
        now = 0.0
        for sender in self._senders.values():
            self._issue(sender, now)
        for worker in self._workers.values():
            self._ask(worker, now)
        while self._events:
            now, _, what, index, version = heapq.heappop(self._events)
            message = self._messages[index]
            if what == "issued":
                message.is_issued = True
                self._try(index, now)
            elif what == "moves":
                self._begin(index, now)
            elif what == "handled":
                worker = self._workers[message.worker]
                worker.handled += 1
                self._ask(worker, now)
            elif version == message.version:
                self._end(index, now)
        assert all(message.is_done for message in self._messages), "a message waits for ever"
        return max(worker.free for worker in self._workers.values())

    def _push(self, at: float, what: str, index: int, version: int = 0) -> None:
        heapq.heappush(self._events, (at, next(self._count), what, index, version))

    def _issue(self, sender: _Sender, now: float) -> None:
        while sender.oldest < len(sender.order) and self._messages[sender.order[sender.oldest]].is_done:
            sender.oldest += 1
        while sender.next < len(sender.order) and sender.next - sender.oldest < MESSAGES_UNDER_WAY:
            index = sender.order[sender.next]
            sender.free = max(sender.free, now) + self._messages[index].send
            sender.next += 1
            self._push(sender.free, "issued", index)

    def _ask(self, worker: _Worker, now: float) -> None:
        while worker.next < len(worker.order) and worker.next - worker.handled < MESSAGES_UNDER_WAY:
            index = worker.order[worker.next]
            worker.next += 1
            self._messages[index].is_asked = True
            self._try(index, now)

    def _try(self, index: int, now: float) -> None:
        message = self._messages[index]
        is_first = all(self._queues[end][0] == index for end in message.lanes)
        if message.is_issued and message.is_asked and is_first and not message.is_moving:
            message.is_moving = True
            self._push(now + self._rates.message, "moves", index)

    def _begin(self, index: int, now: float) -> None:
        message = self._messages[index]
        message.since = now
        self._senders[message.source].moving.add(index)
        self._workers[message.worker].moving.add(index)
        self._share(message, now)

    def _share(self, message: _Message, now: float) -> None:
        """New rates of all that shares a card with ``message``."""
        nic = self._rates.nic
        for index in self._senders[message.source].moving | self._workers[message.worker].moving:
            other = self._messages[index]
            sharing = max(len(self._senders[other.source].moving), len(self._workers[other.worker].moving))
            rate = nic / sharing
            if rate == other.rate:
                continue
            other.left -= (now - other.since) * other.rate
            other.since, other.rate, other.version = now, rate, other.version + 1
            self._push(now + max(other.left, 0.0) / rate, "ends", index, other.version)

    def _end(self, index: int, now: float) -> None:
        message = self._messages[index]
        message.is_done = True
        sender, worker = self._senders[message.source], self._workers[message.worker]
        sender.moving.discard(index)
        worker.moving.discard(index)
        self._share(message, now)
        for end in message.lanes:
            queue = self._queues[end]
            queue.popleft()
            if queue:
                self._try(queue[0], now)
        self._issue(sender, now)
        # A worker handles what has arrived in the order in which it asked.
        while worker.arrived < len(worker.order) and self._messages[worker.order[worker.arrived]].is_done:
            first = worker.order[worker.arrived]
            worker.arrived += 1
            worker.free = max(worker.free, now) + self._messages[first].receive
            self._push(worker.free, "handled", first)
