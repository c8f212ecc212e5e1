"""Bytes between two processes of a transfer group: sockets, or NCCL."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "NCCL_LANES",
    "CudaQueue",
    "Event",
    "GivenUp",
    "GlooLink",
    "Lanes",
    "Link",
    "NcclLink",
    "Work",
    "join_group",
    "meet",
    "new_token",
    "open_link",
]

NCCL_LANES = 4  # messages of one engine that a GPU can have on the wire at the same time
_TAG = 7
_POLL_SECONDS = 0.1  # between looks at the other ranks
_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.01, 0.5  # between looks at who has come: thousands of ranks ask one store
_LEAVE_SECONDS = 10.0  # for calls that were given up to return
_GIVEN_UP = "given up"  # in the store of a group: an end is lost, and how
_WATCH_SECONDS = 0.5  # between looks at transfers over NCCL and at the store
_LEAST_POLL_SECONDS, _MOST_POLL_SECONDS = 2e-5, 2e-3  # between looks at a GPU's event
_DONE, _UNDER_WAY, _FAILED = 0, 1, 2  # of the calls of one rank


GivenUp = threading.Event
"""Set when somebody that a call waits for will not come."""


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> Any: ...


class Link(Protocol):
    """Point-to-point between the ranks of one transfer group; sending and receiving return at once."""

    def send(self, data: Tensor, rank: int) -> Work: ...

    def receive(self, buffer: Tensor, rank: int) -> Work:
        """Fill ``buffer``, uint8 [num_bytes] in one piece on the engine's device; valid when the work is done."""
        ...

    def give_up(self, reason: str) -> None:
        """An end of the link is known to be lost: whoever waits on it, here or elsewhere, waits no longer."""
        ...

    def close(self) -> None:
        """Not to be used again."""
        ...


class GlooLink:
    """Sockets: for CPU, and for engines that share no GPU network with the trainer.

    A process that ends closes its sockets, which ends every wait for it.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, data: Tensor, rank: int) -> Work:
        return self._group.send([data.cpu()], rank, _TAG)

    def receive(self, buffer: Tensor, rank: int) -> Work:
        if buffer.device.type == "cpu":
            return self._group.recv([buffer], rank, _TAG)
        staged = torch.empty_like(buffer, device="cpu")
        return _Staged(self._group.recv([staged], rank, _TAG), staged, buffer)

    def give_up(self, reason: str) -> None:
        pass

    def close(self) -> None:
        self._group = None


class _Staged:
    """A message on its way to a GPU through this machine's memory."""

    def __init__(self, work: Work, staged: Tensor, buffer: Tensor) -> None:
        self._work, self._staged, self._buffer = work, staged, buffer

    def wait(self) -> None:
        self._work.wait()
        self._buffer.copy_(self._staged)


class Event(Protocol):
    """As ``torch.cuda.Event``."""

    def query(self) -> bool: ...


class CudaQueue:
    """The stream that a link's transfers run on, beside the one that packs and loads."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def put(self, transfer: Callable[[Any], None], data: Tensor) -> Event:
        """Run ``transfer(stream)`` behind what has been asked for so far; ``data`` may be packed or read just now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        transfer(self._stream)
        data.record_stream(self._stream)
        return self._stream.record_event()


class NcclLink:
    """NCCL between GPUs, through communicators that vLLM brings, each on a stream of its own.  Not run on GPUs.

    A communicator carries one message after the other, so a worker with one would wait for each of its peers in turn.
    Both ends count their messages, and put each into the same lane (:class:`Lanes`).

    NCCL waits for a lost peer for ever, in a kernel or in the call that starts it.  So a thread watches what is under
    way: when it takes longer than ``timeout_seconds``, or when any end has given up (it says so in ``store``), the
    communicators are aborted, which ends both waits, and the work raises ConnectionError.

    Args:
        communicators: a lane each: ``send``, ``recv`` (tensor, rank, stream) and ``destroy``, which aborts.
        rank: of this end.
        device: of what is sent.
        store: of the group; others may still be reading from it.
        timeout_seconds: for one message.
        queues: of the lanes; default: a stream of its own on ``device`` for each.
    """

    def __init__(
        self,
        communicators: Sequence[Any],
        rank: int,
        device: torch.device,
        store: dist.Store,
        *,
        timeout_seconds: float,
        queues: Sequence[CudaQueue] | None = None,
    ) -> None:
        self._device, self._store = device, store
        self._timeout = timeout_seconds
        self._lanes = Lanes(rank, len(communicators))
        queues = [CudaQueue(device) for _ in communicators] if queues is None else queues
        self._ways = list(zip(communicators, queues, strict=True))
        self._begun: dict[int, float] = {}  # when the transfers under way began
        self._count = 0
        self._reason = ""
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, name="nccl watch", daemon=True).start()

    def send(self, data: Tensor, rank: int) -> Work:
        data = data.to(self._device)
        communicator, queue = self._ways[self._lanes.next(rank)]
        return self._put(queue, lambda stream: communicator.send(data, rank, stream), data)

    def receive(self, buffer: Tensor, rank: int) -> Work:
        communicator, queue = self._ways[self._lanes.next(rank)]
        return self._put(queue, lambda stream: communicator.recv(buffer, rank, stream), buffer)

    def give_up(self, reason: str) -> None:
        self._reason = self._reason or reason
        with contextlib.suppress(RuntimeError):  # the store may be what is lost
            self._store.set(_GIVEN_UP, reason)

    def close(self) -> None:
        if not self._is_over.is_set():
            self._is_over.set()
            for communicator, _ in self._ways:
                communicator.destroy()

    def _put(self, queue: CudaQueue, transfer: Callable[[Any], None], data: Tensor) -> Work:
        self._check()
        self._count += 1
        number = self._count
        self._begun[number] = time.monotonic()
        try:
            return _Enqueued(self, number, queue.put(transfer, data))
        except Exception as error:
            self._begun.pop(number, None)
            self._check()  # an aborted communicator fails as well, with less to say
            raise ConnectionError(f"NCCL refused a transfer: {error}") from error

    def finish(self, number: int, event: Event) -> None:
        """Return when a transfer is done; on this thread, so that the host knows it, too."""
        pause = _LEAST_POLL_SECONDS
        try:
            while not event.query():
                self._check()
                time.sleep(pause)
                pause = min(2 * pause, _MOST_POLL_SECONDS)
            self._check()  # kernels of an aborted communicator end as if they had done something
        finally:
            self._begun.pop(number, None)

    def _check(self) -> None:
        if self._is_over.is_set():
            raise ConnectionError(self._reason or "the link is closed")

    def _watch(self) -> None:
        while not self._is_over.wait(_WATCH_SECONDS):
            oldest = min(list(self._begun.values()), default=time.monotonic())
            try:
                if not self._reason and self._store.check([_GIVEN_UP]):
                    self._reason = bytes(self._store.get(_GIVEN_UP)).decode(errors="replace")
            except RuntimeError as error:  # the rank that keeps it is gone
                self._reason = self._reason or f"the store of the link is gone: {error}"
            if not self._reason and time.monotonic() - oldest > self._timeout:
                self.give_up(f"a transfer over NCCL was not done after {self._timeout:g} s")
            if self._reason:
                self.close()


class _Enqueued:
    """A transfer that a stream has been asked for."""

    def __init__(self, link: NcclLink, number: int, event: Event) -> None:
        self._link, self._number, self._event = link, number, event

    def wait(self) -> None:
        self._link.finish(self._number, self._event)


class Lanes:
    """Which of ``count`` lanes a message takes: the same at both ends, another for the next peer and the next message.

    Messages between two ranks are in one order at both.  What is first in the order of all messages is first in its
    lane at both ends, too, so nobody waits in a circle.
    """

    def __init__(self, rank: int, count: int) -> None:
        self._rank, self._count = rank, count
        self._seen: dict[int, int] = {}  # messages with each peer so far

    def next(self, peer: int) -> int:
        """Lane of the next message to or from ``peer``."""
        seen = self._seen.get(peer, 0)
        self._seen[peer] = seen + 1
        return (self._digits(self._rank) + self._digits(peer) + seen) % self._count

    def _digits(self, rank: int) -> int:
        """Their sum, to the base of the lanes: neighbours differ, and so do ranks that lie a stage or two apart."""
        total = 0
        while rank and self._count > 1:
            rank, digit = divmod(rank, self._count)
            total += digit
        return total


def open_link(
    backend: str,
    address: str,
    port: int,
    rank: int,
    world_size: int,
    timeout_seconds: int,
    device: torch.device,
    token: str = "",
    given_up: GivenUp | None = None,
    listener: socket.socket | None = None,
) -> Link:
    """Join an engine's transfer group, ``gloo`` or ``nccl``; all its ranks call this together.

    Rank 0 brings the socket that listens on ``address`` and ``port``, and gives it away.  Raises ConnectionError when
    one of them gives up, TimeoutError when they do not come within ``timeout_seconds``.
    """
    store = _gather(address, port, rank, world_size, timeout_seconds, token, given_up, listener)
    match backend:
        case "gloo":
            return GlooLink(_gloo_group(store, rank, world_size, timeout_seconds))
        case "nccl":
            ways = [_nccl_communicator(store, f"nccl{i}", rank, world_size, device) for i in range(NCCL_LANES)]
            return NcclLink(ways, rank, device, store, timeout_seconds=timeout_seconds)
    raise ValueError(f"no link {backend!r}: expected gloo or nccl")


def join_group(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    timeout_seconds: int,
    *,
    token: str = "",
    given_up: GivenUp | None = None,
    listener: socket.socket | None = None,
) -> Any:
    """A gloo group beside torch's default one, which neither Megatron nor vLLM ever sees; as :func:`open_link`."""
    store = _gather(address, port, rank, world_size, timeout_seconds, token, given_up, listener)
    return _gloo_group(store, rank, world_size, timeout_seconds)


def new_token() -> str:
    """A name for a group that nobody can guess."""
    return secrets.token_hex(16)


def _gloo_group(store: dist.Store, rank: int, world_size: int, timeout_seconds: int) -> Any:
    """Connected at once, whatever ``TORCH_GLOO_LAZY_INIT`` says: it is set for the trainer's ranks and not for engines
    on other machines, and two ends that differ in it read each other's addresses wrong (a crash inside gloo)."""
    gloo: Any = dist.ProcessGroupGloo
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=name, lazy_init=False) for name in interfaces] or [
        gloo.create_default_device(lazy_init=False)
    ]
    options._timeout = timedelta(seconds=timeout_seconds)
    return gloo(store, rank, world_size, options)


def _nccl_communicator(store: dist.Store, name: str, rank: int, world_size: int, device: torch.device) -> Any:
    """vLLM's; its unique id travels through ``store``, so that no second port is needed."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.utils.nccl import unpinned_nccl_env

    group = StatelessProcessGroup(rank=rank, world_size=world_size, store=dist.PrefixStore(name, store))
    with unpinned_nccl_env():
        return PyNcclCommunicator(group, device=device)


def _gather(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    timeout_seconds: int,
    token: str,
    given_up: GivenUp | None,
    listener: socket.socket | None,
) -> dist.Store:
    """Wait until all are there, before anything is opened that waits without looking up.

    Rank 0 listens, on one address alone (left to itself PyTorch's store listens on every address of the machine).
    Only who knows ``token`` finds the others there: it is made anew for every group (:func:`new_token`).
    """
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_seconds), "wait_for_workers": False}
    if rank == 0:
        assert listener is not None, "rank 0 listens before it tells anybody where"
        options["master_listen_fd"] = listener.detach()  # the store closes it
    everybody = dist.TCPStore(address, port, world_size, is_master=rank == 0, **options)
    store = dist.PrefixStore(f"weight_sync/{token}", everybody)
    end = time.monotonic() + timeout_seconds
    present, pause = store.add("present", 1), _FIRST_LOOK_SECONDS
    while present < world_size:
        if given_up is not None and given_up.is_set():
            store.set(_GIVEN_UP, "")
        if store.check([_GIVEN_UP]):
            raise ConnectionError(f"an end of the link was lost when {present} of {world_size} had come")
        if time.monotonic() > end:
            raise TimeoutError(f"{present} of {world_size} came to {address}:{port} within {timeout_seconds} s")
        time.sleep(pause)
        present, pause = store.add("present", 0), min(2 * pause, _LOOK_SECONDS)
    return store


def meet(
    calls: Sequence[Callable[[GivenUp], Any]], worst_of_ranks: Callable[[int], int] = lambda state: state
) -> list[Any]:
    """Results of ``calls``, which wait for each other, for instance two ends of a link that is being opened.

    They run in threads, and the ranks compare how far they are (``worst_of_ranks``: the largest of their integers).
    When a call has failed anywhere its peers' are given up, on every rank: nobody waits until the time is over for
    somebody who is gone.  Then the ranks where one failed raise what it raised, the others ConnectionError.
    """
    given_up = threading.Event()
    futures = [_in_thread(call, given_up) for call in calls]
    while True:
        done = wait(futures, _POLL_SECONDS, FIRST_EXCEPTION).done
        failed = [future for future in done if future.exception() is not None]
        worst = worst_of_ranks(_FAILED if failed else _UNDER_WAY if len(done) < len(futures) else _DONE)
        if worst == _DONE:
            return [future.result() for future in futures]
        if worst == _FAILED:
            given_up.set()
            wait(futures, _LEAVE_SECONDS)
            if failed:
                failed[0].result()
            raise ConnectionError("another rank reported a fault")


def _in_thread(call: Callable[[GivenUp], Any], given_up: GivenUp) -> Future[Any]:
    """Not a pool's: those keep the interpreter from ending until their calls return."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(given_up))
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="weight sync", daemon=True).start()
    return future
