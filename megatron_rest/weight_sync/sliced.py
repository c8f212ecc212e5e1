"""Slices: every training rank sends every worker of every engine its part of the plan, nothing else moves.

    connect   engines say how they are laid out, ranks say what they hold; everybody makes the same plans; the ranks
              and one engine's workers meet in a process group of that engine; workers get their schedules
    attempt   engines start an update, ranks send, engines finish; digests of all ranks and workers are compared on
              every rank, so every rank knows the same faults by name

Whatever breaks on one rank reaches the others in the next exchange between ranks; sends to a dead worker fail.
"""

from __future__ import annotations

import functools
import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rest.config import ConfigError
from megatron_rest.network import listen, own_address
from megatron_rest.weight_sync.engine_side import Hello, introductions, worker_tensors
from megatron_rest.weight_sync.fp8 import QuantisedShards
from megatron_rest.weight_sync.links import GivenUp, Link, meet, new_token, open_link
from megatron_rest.weight_sync.plan import SyncPlan, make_plan
from megatron_rest.weight_sync.slices import SliceSender, hand_out, message_names
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weight_sync.transport import EngineUnreachableError, Outcome, SyncTarget, Tamper

__all__ = ["SliceTransport"]

_TIMEOUT_SECONDS = 600
_FIRST = 0  # the rank whose address and ports count


@dataclass(frozen=True, slots=True)
class _Result:
    """What a rank says after an attempt."""

    sent: dict[tuple[int, int], list[tuple[int, int]]]  # digests by (engine, position in its plan)
    received: list[dict[str, Any]] | None  # of its engine's workers
    num_bytes: int
    replicas: list[tuple[str, tuple[int, int]]]


class SliceTransport:
    """Point-to-point transfer by plan.

    Args:
        source: the policy's shards; its ranks are the senders.
        message_bytes: size at which a message is closed.
        backend: ``gloo`` or ``nccl``: what links senders and workers.
        timeout_seconds: how long either side waits for the other.
    """

    def __init__(
        self,
        source: MegatronWeightSource,
        *,
        message_bytes: int,
        backend: str = "gloo",
        timeout_seconds: int = _TIMEOUT_SECONDS,
    ) -> None:
        self._source = source
        self._message_bytes = message_bytes
        self._backend = backend
        self._timeout_seconds = timeout_seconds
        self.plans: list[SyncPlan] = []
        """One for each engine, in the order of the ranks that own them."""
        self._mine: int | None = None  # index of this rank's engine
        self._links: list[Link] = []
        self._sender: SliceSender | None = None

    def connect(self, engine: SyncTarget | None) -> None:
        """Raises ValueError when the layouts do not fit, ConnectionError when an engine cannot be reached."""
        hellos = introductions(self._source, engine)
        owners = [rank for rank, hello in enumerate(hellos) if hello.layout is not None]
        held = self._source.all_gather(self._source.holdings())
        self.plans, load = [], [0] * len(held)
        for rank in owners:
            layout = hellos[rank].layout
            assert layout is not None
            tensors, form = worker_tensors(self._source.shape, layout)
            plan = make_plan(self._source.shape, held, tensors, form=form, message_bytes=self._message_bytes, load=load)
            self.plans.append(plan)
            load = [a + b for a, b in zip(load, plan.sent_by, strict=True)]
        self._mine = owners.index(self._source.rank) if self._source.rank in owners else None
        self._links = self._meet(engine, owners, hellos, len(held))
        self._sender = SliceSender(self._source.rank, self.plans, self._links, len(held), self._source.device)

    def attempt(self, engine: SyncTarget | None, *, detailed: bool, tamper: Tamper | None) -> Outcome:
        """See :class:`~megatron_rest.weight_sync.transport.Transport`."""
        assert self._sender is not None, "connect() comes first"
        outcome = Outcome()
        shards = self._source.local_shards()
        replicas = self._source.replica_digests(shards)
        # Replicas hold the same in FP8: a matrix is quantised once for all of them.
        forms = dict.fromkeys(plan.form for plan in self.plans if plan.form is not None)
        quantised = {form: QuantisedShards(self._source, shards, form) for form in forms}
        of_engines = [shards if plan.form is None else quantised[plan.form] for plan in self.plans]
        outcome.non_finite = [name for view in quantised.values() for name in view.non_finite]
        try:
            if engine is not None and not outcome.non_finite:
                engine.start_weight_update()
        except Exception as e:  # noqa: BLE001  raised by WeightSync after all ranks have agreed
            outcome.error = e
        if self._source.worst_of_ranks(int(outcome.is_broken)):
            return outcome  # nobody may send to a worker that does not listen
        sent, received = {}, None
        started = time.perf_counter()
        executor = ThreadPoolExecutor(1)  # workers load while this rank sends
        try:
            loading = None if engine is None else executor.submit(engine.update_weights, {"detailed": detailed})
            if loading is not None:
                loading.add_done_callback(self._tell_all_of_a_loss)
            sent = self._sender.send(of_engines, detailed=detailed, tamper=tamper)
            if self._mine in self._sender.broken:
                raise self._sender.broken[self._mine]
            if engine is not None and loading is not None:
                loading.result()
                outcome.transfer_seconds = time.perf_counter() - started
                engine.finish_weight_update()
                received = engine.received_weights()
        except Exception as e:  # noqa: BLE001  as above
            outcome.error = e
        finally:
            executor.shutdown(wait=False)
        results = self._source.all_gather(_Result(sent, received, self._sender.num_bytes, replicas))
        outcome.lost_peers = {i: f"the link to engine {i} broke: {e}" for i, e in self._sender.broken.items()}
        if not self._source.worst_of_ranks(int(outcome.is_broken)):
            self._compare(outcome, results)
        self._source.note_drift([result.replicas for result in results])
        return outcome

    def _tell_all_of_a_loss(self, loading: Future[None]) -> None:
        """Ranks that send to an engine that broke would not notice by every kind of link."""
        if self._mine is not None and self._mine < len(self._links) and (error := loading.exception()) is not None:
            self._links[self._mine].give_up(f"the engine is lost: {error}")

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._links = []

    def _compare(self, outcome: Outcome, results: Sequence[_Result]) -> None:
        """Every digest of a sender with the worker's, every count of bytes with the plan's; on every rank alike."""
        sent: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for result in results:
            sent |= result.sent
        engines = [result.received for result in results if result.received is not None]
        for index, (plan, workers) in enumerate(zip(self.plans, engines, strict=True)):
            for worker, report in enumerate(workers):
                mine = [i for i, message in enumerate(plan.messages) if message.worker == worker]
                for position, got in zip(mine, report["digests"], strict=True):
                    expected = sent[index, position]
                    outcome.wrong += _wrong_names(plan, position, expected, [tuple(value) for value in got])
                outcome.wrong += [f"{name} (engine parameter that nothing was sent for)" for name in report["missing"]]
                if report["num_bytes"] != plan.received_by()[worker]:
                    outcome.wrong.append(
                        f"worker {worker} of engine {index}: {report['num_bytes']} bytes came, "
                        f"{plan.received_by()[worker]} were planned"
                    )
        outcome.wrong = list(dict.fromkeys(outcome.wrong))
        outcome.num_bytes = sum(result.num_bytes for result in results)
        outcome.num_tensors = sum(len(tensors) for plan in self.plans for tensors in plan.tensors)
        outcome.checksum = hashlib.blake2b(
            repr(sorted((key, digests[0]) for key, digests in sent.items())).encode(), digest_size=8
        ).hexdigest()

    def _meet(
        self, engine: SyncTarget | None, owners: Sequence[int], hellos: Sequence[Hello], num_sources: int
    ) -> list[Link]:
        """One transfer group an engine: sources first, then its workers; the workers get their schedules."""
        # On one machine the loopback is enough, and no name has to resolve.
        machines = {hello.host for hello in hellos}
        listeners: list[socket.socket | None] = [None] * len(owners)
        offer: tuple[str, list[tuple[int, str]]] | ConfigError | None = None
        if self._source.rank == _FIRST:
            try:
                address = "127.0.0.1" if len(machines) == 1 else own_address(several_machines=True)
                listeners = [listen(address) for _ in owners]
                offer = address, [(one.getsockname()[1], new_token()) for one in listeners if one is not None]
            except ConfigError as error:
                offer = error
        offer = self._source.all_gather(offer)[_FIRST]
        if isinstance(offer, ConfigError):
            raise offer
        assert offer is not None
        address, places = offer
        links: list[Link] = []
        for index, (plan, (port, token), listener) in enumerate(zip(self.plans, places, listeners, strict=True)):
            info = {
                "master_address": address,
                "master_port": port,
                "rank_offset": num_sources,
                "world_size": num_sources + len(plan.tensors),
                "timeout_seconds": self._timeout_seconds,
                "backend": self._backend,
                "token": token,
            }
            calls: list[Callable[[GivenUp], Any]] = [functools.partial(self._open, plan, info, listener)]
            if engine is not None and index == self._mine:
                calls.append(functools.partial(_join, engine, info))
            try:
                links.append(meet(calls, self._source.worst_of_ranks)[0])
            except Exception as error:
                for link in links:
                    link.close()
                message = f"training ranks and engine {index} did not meet: {error}"
                raise EngineUnreachableError(message, [index]) from error
        return links

    def _open(self, plan: SyncPlan, info: dict[str, Any], listener: socket.socket | None, given_up: GivenUp) -> Link:
        rank, device, num_sources = self._source.rank, self._source.device, info["rank_offset"]
        if device.type == "cuda":
            torch.cuda.set_device(device)  # this thread's, too
        place = (info["master_address"], info["master_port"], rank, info["world_size"], self._timeout_seconds)
        link = open_link(self._backend, *place, device, info["token"], given_up, listener)
        if rank == _FIRST:
            hand_out(plan, link, num_sources)
        return link


def _wrong_names(
    plan: SyncPlan, position: int, expected: Sequence[tuple[int, int]], got: Sequence[tuple[int, ...]]
) -> Iterator[str]:
    message = plan.messages[position]
    if tuple(expected[0]) == tuple(got[0]):
        return
    targets = zip(plan.targets(message), expected[1:], got[1:], strict=False)
    names = [tensor.name for tensor, a, b in targets if a != b]
    yield from names or message_names(plan, message)  # without details any of its tensors may be the one


def _join(engine: SyncTarget, info: dict[str, Any], given_up: GivenUp) -> None:
    """Its workers look for themselves whether somebody has given up."""
    engine.init_weight_transfer(info)
