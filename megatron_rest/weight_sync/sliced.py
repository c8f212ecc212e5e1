"""Slices: every training rank sends every worker of every engine its part of the plan, nothing else moves.

    connect   engines say how they are laid out, ranks say what they hold; everybody makes the same plans; the ranks
              that send to an engine and its workers meet in a process group of that engine; workers get their schedules
    attempt   engines start an update, ranks send, engines finish; one digest of what each rank and worker exchanged is
              compared on every rank, then those of the messages where it differs: every rank knows the same faults by
              name

Whatever breaks on one rank reaches the others in the next exchange between ranks; sends to a dead worker fail.
"""

from __future__ import annotations

import functools
import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rest.config import ConfigError
from megatron_rest.network import listen, own_address
from megatron_rest.weight_sync.engine_side import Hello, introductions, worker_tensors
from megatron_rest.weight_sync.fp8 import QuantisedShards
from megatron_rest.weight_sync.layouts import EngineTensor, Fp8Form
from megatron_rest.weight_sync.links import GivenUp, Link, meet, new_token, open_link
from megatron_rest.weight_sync.plan import SyncPlan, make_plans, without_collector
from megatron_rest.weight_sync.slices import SliceSender, folded, hand_out, message_names
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weight_sync.transport import EngineUnreachableError, Outcome, SyncTarget, Tamper

__all__ = ["SliceTransport"]

_TIMEOUT_SECONDS = 600

_Digests = list[list[tuple[int, int]]]
"""Of messages in their order, each as in :data:`~megatron_rest.weight_sync.slices.MessageDigests`."""


@dataclass(frozen=True, slots=True)
class _Received:
    """What a worker got."""

    folded: dict[int, int]  # by source
    missing: list[str]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Result:
    """What a rank says after an attempt."""

    sent: dict[tuple[int, int], int]  # by (engine, worker): its messages' digests, folded
    received: list[_Received]  # by its engine's workers
    num_bytes: int
    replicas: list[tuple[str, tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an engine's transfer group gathers."""

    address: str
    port: int
    token: str


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
        self._pairs: list[dict[tuple[int, int], list[int]]] = []  # of each plan
        self._owners: list[int] = []
        self._mine: int | None = None  # index of this rank's engine
        self._links: list[Link | None] = []  # of each plan; None: this rank sends that engine nothing
        self._sender: SliceSender | None = None

    def connect(self, engine: SyncTarget | None) -> None:
        """Raises ValueError when the layouts do not fit, ConnectionError when an engine cannot be reached."""
        hellos = introductions(self._source, engine)
        self._owners = [rank for rank, hello in enumerate(hellos) if hello.layout is not None]
        held = self._source.all_gather(self._source.holdings())
        with without_collector():
            engines = self._engines(hellos)
            self.plans = make_plans(self._source.shape, held, engines, message_bytes=self._message_bytes)
        self._pairs = [plan.pairs() for plan in self.plans]
        self._mine = self._owners.index(self._source.rank) if self._source.rank in self._owners else None
        self._links = self._meet(engine, hellos)
        self._sender = SliceSender(self._source.rank, self.plans, self._links, self._source.device)

    def _engines(self, hellos: Sequence[Hello]) -> list[tuple[list[list[EngineTensor]], Fp8Form | None]]:
        """Tensors of every engine's workers; the same object for engines that say the same of themselves."""
        known: list[tuple[list[dict[str, Any]], tuple[list[list[EngineTensor]], Fp8Form | None]]] = []
        engines = []
        for rank in self._owners:
            layout = hellos[rank].layout
            assert layout is not None
            found = next((engine for said, engine in known if said == layout), None)
            if found is None:
                found = worker_tensors(self._source.shape, layout)
                known.append((layout, found))
            engines.append(found)
        return engines

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
        sent: dict[tuple[int, int], list[tuple[int, int]]] = {}
        reports: list[dict[str, Any]] = []
        received_from: list[dict[int, _Digests]] = []
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
                reports = engine.received_weights()
                received_from = self._received_from(reports)
        except Exception as e:  # noqa: BLE001  as above
            outcome.error = e
        finally:
            executor.shutdown(wait=False)
        is_whole = outcome.error is None and not self._sender.broken
        sent_to = self._sent_to(sent) if is_whole else {}
        received = [
            _Received({source: folded(d) for source, d in of_worker.items()}, report["missing"], report["num_bytes"])
            for of_worker, report in zip(received_from, reports, strict=is_whole)
        ]
        folds = {pair: folded(digests) for pair, digests in sent_to.items()}
        results = self._source.all_gather(_Result(folds, received, self._sender.num_bytes, replicas))
        outcome.lost_peers = {i: f"the link to engine {i} broke: {e}" for i, e in self._sender.broken.items()}
        if not self._source.worst_of_ranks(int(outcome.is_broken)):
            different = self._compare(outcome, results)
            if different:
                self._name(outcome, different, sent_to, received_from)
        self._source.note_drift([result.replicas for result in results])
        return outcome

    def _tell_all_of_a_loss(self, loading: Future[None]) -> None:
        """Ranks that send to an engine that broke would not notice by every kind of link."""
        link = self._links[self._mine] if self._mine is not None and self._mine < len(self._links) else None
        if link is not None and (error := loading.exception()) is not None:
            link.give_up(f"the engine is lost: {error}")

    def close(self) -> None:
        for link in self._links:
            if link is not None:
                link.close()
        self._links = []

    def _sent_to(self, sent: dict[tuple[int, int], list[tuple[int, int]]]) -> dict[tuple[int, int], _Digests]:
        """Digests of this rank's messages by (engine, worker), from those by (engine, position in its plan)."""
        return {
            (engine, worker): [sent[engine, position] for position in positions]
            for engine, pairs in enumerate(self._pairs)
            for (source, worker), positions in pairs.items()
            if source == self._source.rank
        }

    def _received_from(self, reports: Sequence[dict[str, Any]]) -> list[dict[int, _Digests]]:
        """Digests that each worker of this rank's engine took, by source."""
        assert self._mine is not None
        received: list[dict[int, _Digests]] = [{} for _ in reports]
        messages = self.plans[self._mine].messages
        for worker, report in enumerate(reports):
            mine = [message.source for message in messages if message.worker == worker]
            for source, digests in zip(mine, report["digests"], strict=True):
                received[worker].setdefault(source, []).append([(int(a), int(b)) for a, b in digests])
        return received

    def _compare(self, outcome: Outcome, results: Sequence[_Result]) -> list[tuple[int, int, int]]:
        """What each sender says with what its worker says, every count of bytes with the plan's; on every rank alike.

        Returns the (engine, source, worker) whose digests differ.
        """
        different = []
        for index, (plan, owner) in enumerate(zip(self.plans, self._owners, strict=True)):
            workers, planned = results[owner].received, plan.received_by()
            for source, worker in self._pairs[index]:
                if results[source].sent[index, worker] != workers[worker].folded[source]:
                    different.append((index, source, worker))
            for worker, report in enumerate(workers):
                outcome.wrong += [f"{name} (engine parameter that nothing was sent for)" for name in report.missing]
                if report.num_bytes != planned[worker]:
                    outcome.wrong.append(
                        f"worker {worker} of engine {index}: {report.num_bytes} bytes came, "
                        f"{planned[worker]} were planned"
                    )
        outcome.num_bytes = sum(result.num_bytes for result in results)
        outcome.num_tensors = sum(len(tensors) for plan in self.plans for tensors in plan.tensors)
        everything = [
            (source, *pair, fold) for source, r in enumerate(results) for pair, fold in sorted(r.sent.items())
        ]
        outcome.checksum = hashlib.blake2b(repr(everything).encode(), digest_size=8).hexdigest()
        return different

    def _name(
        self,
        outcome: Outcome,
        different: Sequence[tuple[int, int, int]],
        sent_to: dict[tuple[int, int], _Digests],
        received_from: Sequence[dict[int, _Digests]],
    ) -> None:
        """The tensors that differ, from the digests of the messages of these (engine, source, worker) alone."""
        rank = self._source.rank
        sent = {key: sent_to[key[0], key[2]] for key in different if key[1] == rank}
        received = {key: received_from[key[2]][key[1]] for key in different if key[0] == self._mine}
        of_ranks = self._source.all_gather((sent, received))
        for key in different:
            index, source, worker = key
            pair = zip(of_ranks[source][0][key], of_ranks[self._owners[index]][1][key], strict=True)
            for position, (expected, got) in zip(self._pairs[index][source, worker], pair, strict=True):
                outcome.wrong += _wrong_names(self.plans[index], position, expected, got)
        outcome.wrong = list(dict.fromkeys(outcome.wrong))

    def _meet(self, engine: SyncTarget | None, hellos: Sequence[Hello]) -> list[Link | None]:
        """A transfer group for every engine: the ranks that send to it, then its workers, which get their schedules.

        An engine's first source says where its group gathers.  A rank opens its groups one after the other, all ranks
        in the same order; groups that have no rank in common are opened at the same time.
        """
        rank = self._source.rank
        # On one machine the loopback is enough, and no name has to resolve.
        is_one_machine = len({hello.host for hello in hellos}) == 1
        listeners: dict[int, socket.socket] = {}
        offer: dict[int, _Place] | ConfigError = {}
        first_of = [index for index, plan in enumerate(self.plans) if plan.sources[0] == rank]
        try:
            address = "127.0.0.1" if is_one_machine or not first_of else own_address(several_machines=True)
            listeners = {index: listen(address) for index in first_of}
            offer = {i: _Place(address, one.getsockname()[1], new_token()) for i, one in listeners.items()}
        except ConfigError as error:
            offer = error
        places: dict[int, _Place] = {}
        for said in self._source.all_gather(offer):
            if isinstance(said, ConfigError):
                raise said
            places |= said
        infos = [
            {
                "master_address": places[index].address,
                "master_port": places[index].port,
                "rank_offset": len(plan.sources),
                "world_size": len(plan.sources) + len(plan.tensors),
                "timeout_seconds": self._timeout_seconds,
                "backend": self._backend,
                "token": places[index].token,
            }
            for index, plan in enumerate(self.plans)
        ]
        calls: list[Callable[[GivenUp], Any]] = [functools.partial(self._open, infos, listeners)]
        if engine is not None and self._mine is not None:
            calls.append(functools.partial(_join, engine, self._mine, infos[self._mine]))
        failure: Exception | None = None
        links: list[Link | None] = []
        try:
            links = meet(calls, self._source.worst_of_ranks)[0]
        except Exception as error:  # noqa: BLE001  on every rank; those where it began know which engine it was
            failure = error
        blamed = self._source.all_gather(failure.index if isinstance(failure, _NotMetError) else None)
        if failure is not None:
            engines = sorted({index for index in blamed if index is not None})
            which = f"engine {', '.join(map(str, engines))}" if engines else "engines"
            reason = failure.__cause__ if isinstance(failure, _NotMetError) else failure
            raise EngineUnreachableError(f"training ranks and {which} did not meet: {reason}", engines) from failure
        return links

    def _open(
        self, infos: Sequence[dict[str, Any]], listeners: dict[int, socket.socket], given_up: GivenUp
    ) -> list[Link | None]:
        rank, device = self._source.rank, self._source.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # this thread's, too
        links: list[Link | None] = []
        for index, (plan, info) in enumerate(zip(self.plans, infos, strict=True)):
            if rank not in plan.sources:
                links.append(None)
                continue
            place = plan.sources.index(rank)
            where = (info["master_address"], info["master_port"], place, info["world_size"], self._timeout_seconds)
            try:
                with _named(index):
                    link = open_link(self._backend, *where, device, info["token"], given_up, listeners.get(index))
                    links.append(link)
                    hand_out(plan, link, place)
            except ConnectionError:
                for opened in links:
                    if opened is not None:
                        opened.close()
                raise
        return links


def _wrong_names(
    plan: SyncPlan, position: int, expected: Sequence[tuple[int, int]], got: Sequence[tuple[int, ...]]
) -> Iterator[str]:
    message = plan.messages[position]
    if tuple(expected[0]) == tuple(got[0]):
        return
    targets = zip(plan.targets(message), expected[1:], got[1:], strict=False)
    names = [tensor.name for tensor, a, b in targets if a != b]
    yield from names or message_names(plan, message)  # without details any of its tensors may be the one


def _join(engine: SyncTarget, index: int, info: dict[str, Any], given_up: GivenUp) -> None:
    """Its workers look for themselves whether somebody has given up."""
    with _named(index):
        engine.init_weight_transfer(info)


class _NotMetError(ConnectionError):
    """``index``: of the engine."""

    def __init__(self, index: int, error: Exception) -> None:
        super().__init__(f"engine {index}: {error}")
        self.index = index


@contextmanager
def _named(index: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _NotMetError(index, error) from error
