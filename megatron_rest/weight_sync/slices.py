"""A plan carried out: training ranks pack, cast and send; workers receive, check and put together.

    rank:    slice -> cast -> pack -> digest -> send            eight messages under way: packing overlaps sending
             (what is sent in FP8 is quantised by then: fp8.py)
    worker:  receive (the next ones are asked for already) -> digest -> scatter -> a complete tensor goes to the engine

Nothing but the planned bytes travels: sender and worker know sizes and order from the plan, and the digests are
compared afterwards, over another way: one of all that a pair has exchanged (:func:`folded`), and those of its messages
only where that differs.  A worker whose engine fails goes on receiving, so that no sender waits for it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_rest.weight_sync.digest import digest
from megatron_rest.weight_sync.limits import MESSAGES_UNDER_WAY
from megatron_rest.weight_sync.links import Link, Work
from megatron_rest.weight_sync.plan import Copy, Message, SyncPlan, region
from megatron_rest.weight_sync.staging import Staging

__all__ = [
    "MessageDigests",
    "Schedule",
    "ScheduledTensor",
    "SliceReceiver",
    "SliceSender",
    "folded",
    "hand_out",
    "message_names",
    "receive_schedule",
]

MessageDigests = list[list[tuple[int, int]]]
"""For every message, in order: a digest of the whole; in a detailed pass one of each copy, too."""


def folded(messages: Iterable[Sequence[Sequence[int]]]) -> int:
    """One number, of 64 bits, for the digests of messages in their order; those of copies do not count."""
    data = b"".join(struct.pack("<qq", *digests[0]) for digests in messages)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class ScheduledTensor:
    """An :class:`~megatron_rest.weight_sync.plan.EngineTensor` without its placements."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_whole: bool
    covered: int  # elements that arrive; the others are padding


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What one worker has to know: its tensors, and the messages that fill them, in order.

    Sources are numbered as in the engine's transfer group: by their place in ``SyncPlan.sources``.
    """

    tensors: tuple[ScheduledTensor, ...]
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, plan: SyncPlan, worker: int) -> Schedule:
        place = {rank: i for i, rank in enumerate(plan.sources)}
        return cls(
            tensors=tuple(
                ScheduledTensor(t.name, t.shape, t.dtype, t.is_whole, t.covered) for t in plan.tensors[worker]
            ),
            messages=tuple(
                Message(place[m.source], m.worker, m.copies, m.num_bytes) for m in plan.messages if m.worker == worker
            ),
        )

    def dtypes(self, message: Message) -> list[torch.dtype]:
        """Of each of its copies."""
        return [self.tensors[copy.tensor].dtype for copy in message.copies]

    def to_json(self) -> str:
        """Names and numbers: a worker unpickles nothing that comes over the wire."""
        return json.dumps({
            "tensors": [
                [t.name, t.shape, str(t.dtype).removeprefix("torch."), t.is_whole, t.covered] for t in self.tensors
            ],
            "messages": [
                [m.source, m.worker, m.num_bytes, [[c.tensor, c.start, c.size] for c in m.copies]]
                for m in self.messages
            ],
        })  # fmt: skip

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The inverse, but for what only the source needs of a copy."""
        data = json.loads(text)
        return cls(
            tensors=tuple(
                ScheduledTensor(name, tuple(shape), getattr(torch, dtype), *rest)
                for name, shape, dtype, *rest in data["tensors"]
            ),
            messages=tuple(
                Message(source, worker, tuple(Copy("", (), t, tuple(at), tuple(n)) for t, at, n in copies), num_bytes)
                for source, worker, num_bytes, copies in data["messages"]
            ),
        )


def message_names(plan: SyncPlan, message: Message) -> list[str]:
    """Tensors of the engine that a message writes to."""
    return list(dict.fromkeys(tensor.name for tensor in plan.targets(message)))


class SliceSender:
    """One training rank's part of the plans of all engines.

    Args:
        rank: this rank's number among the training ranks.
        plans: one for each engine.
        links: one for each engine, None for those that this rank sends nothing to; in an engine's transfer group its
            sources come first, then its workers.
        device: of the shards.
    """

    def __init__(
        self, rank: int, plans: Sequence[SyncPlan], links: Sequence[Link | None], device: torch.device
    ) -> None:
        self._links = links
        self._first_workers = [len(plan.sources) for plan in plans]  # number of worker 0 in the engine's group
        # One order that all ranks and workers agree on: position in the plan, then engine.
        mine = [
            (position, engine, message, plan)
            for engine, plan in enumerate(plans)
            for position, message in enumerate(plan.messages)
            if message.source == rank
        ]
        self._messages = sorted(mine, key=lambda entry: entry[:2])
        self._staging = Staging(device)
        self.num_bytes = 0
        """Handed to the links in the last pass."""
        self.broken: dict[int, Exception] = {}
        """Engines whose link broke in the last pass."""

    def send(
        self,
        shards: Sequence[Mapping[str, Tensor]],
        *,
        detailed: bool = False,
        tamper: Callable[[str, Tensor], Tensor] | None = None,
    ) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Send this rank's messages; digests by (engine, position in its plan).

        ``shards`` has this rank's parameters for each engine: the live ones, or for an engine in FP8 the quantised.
        ``tamper`` is fault injection, between digest and link.  A link that breaks, for instance because a worker is
        gone, goes to :attr:`broken`, and its engine gets nothing more; the others get all of theirs.
        """
        digests: dict[tuple[int, int], list[tuple[int, int]]] = {}
        under_way: deque[tuple[int, Work, Tensor]] = deque()  # the engine, and what must live until the work is done
        self.broken.clear()
        self.num_bytes = 0

        def attempt(engine: int, action: Callable[[], Any]) -> Any:
            try:
                return action()
            except Exception as error:  # noqa: BLE001  the other engines must not be left waiting
                self.broken.setdefault(engine, error)

        def finish_one() -> None:
            engine, work, _ = under_way.popleft()
            attempt(engine, work.wait)

        for position, engine, message, plan in self._messages:
            if engine in self.broken:
                continue
            tensors = plan.targets(message)
            dtypes = [tensor.dtype for tensor in tensors]
            packed = pack(message.copies, shards[engine], dtypes, self._staging)
            digests[engine, position] = _digests(packed, message.copies, dtypes, detailed)
            if tamper is not None:
                parts = _parts(message.copies, packed, dtypes)
                packed = _tampered([tensor.name for tensor in tensors], parts, tamper)
            while len(under_way) >= MESSAGES_UNDER_WAY:
                finish_one()
            link = self._links[engine]
            assert link is not None, "every rank that sends to an engine is in its group"
            work = attempt(engine, functools.partial(link.send, packed, self._first_workers[engine] + message.worker))
            if work is not None:
                self.num_bytes += packed.numel()
                under_way.append((engine, work, packed))
        while under_way:
            finish_one()
        return digests


@dataclass(slots=True)
class _Open:
    """A tensor that is not complete yet."""

    value: Tensor
    left: int  # elements


@dataclass(slots=True)
class SliceReceiver:
    """A worker's part: receives its messages and hands complete tensors to ``put``.

    ``put(name, tensor, is_whole)`` gets memory that is its own while any tensor holds it.  Elements that no copy covers
    (padding) are zero.
    """

    link: Link
    schedule: Schedule
    device: torch.device
    put: Callable[[str, Tensor, bool], None]
    num_bytes: int = 0
    """Taken from the link in the last pass."""
    staging: Staging = field(init=False)
    _open: dict[int, _Open] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.staging = Staging(self.device)

    def receive(self, *, detailed: bool = False) -> MessageDigests:
        """One pass over all messages.  Raises the first error of ``put`` when everything has been received."""
        digests: MessageDigests = []
        error: Exception | None = None
        self.num_bytes = 0
        self._open.clear()
        for message, buffer, in_place in self._incoming():
            self.num_bytes += buffer.numel()
            digests.append(_digests(buffer, message.copies, self.schedule.dtypes(message), detailed))
            try:
                self._scatter(message, None if in_place else buffer, hand_over=error is None)
            except Exception as failure:  # noqa: BLE001  raised below: senders must get rid of their messages first
                error = failure
        if error is not None:
            raise error
        return digests

    def _incoming(self) -> Iterator[tuple[Message, Tensor, bool]]:
        """Messages as they arrive, and whether they arrived in the place where they belong."""
        asked: deque[tuple[Message, Tensor, bool, Work]] = deque()
        for message in self.schedule.messages:
            buffer, in_place = self._place(message)
            asked.append((message, buffer, in_place, self.link.receive(buffer, message.source)))
            if len(asked) >= MESSAGES_UNDER_WAY:
                yield _arrived(*asked.popleft())
        while asked:
            yield _arrived(*asked.popleft())

    def _place(self, message: Message) -> tuple[Tensor, bool]:
        if len(message.copies) == 1:
            [copy] = message.copies
            target = region(self._tensor(copy.tensor).value, copy.start, copy.size)
            if target.is_contiguous():
                return target.view(-1).view(torch.uint8), True
        return self.staging.empty(message.num_bytes), False

    def _tensor(self, index: int) -> _Open:
        if index not in self._open:
            wanted = self.schedule.tensors[index]
            numel = torch.Size(wanted.shape).numel()
            value = self.staging.empty(numel * wanted.dtype.itemsize)
            if wanted.covered < numel:
                value.zero_()
            self._open[index] = _Open(value.view(wanted.dtype).view(wanted.shape), wanted.covered)
        return self._open[index]

    def _scatter(self, message: Message, buffer: Tensor | None, hand_over: bool) -> None:
        """Put a message's copies in place, unless they are; complete tensors leave."""
        if buffer is not None:
            places = [region(self._tensor(c.tensor).value, c.start, c.size) for c in message.copies]
            torch._foreach_copy_(places, _parts(message.copies, buffer, self.schedule.dtypes(message)))
        for copy in message.copies:
            target = self._tensor(copy.tensor)
            target.left -= math.prod(copy.size)
            if target.left == 0:
                del self._open[copy.tensor]
                if hand_over:
                    wanted = self.schedule.tensors[copy.tensor]
                    self.put(wanted.name, target.value, wanted.is_whole)


def pack(
    copies: Sequence[Copy], shards: Mapping[str, Tensor], dtypes: Sequence[torch.dtype], staging: Staging
) -> Tensor:
    """The copies' elements one after another, each cast to its data type; uint8 [num_bytes] in ``staging``.

    A copy that is alone, in one piece and of its type already is a view of the live parameter.  Raises TypeError where
    a copy should become FP8 and is not: a cast without a scale would be another number.
    """
    parts = [region(shards[copy.parameter].detach(), copy.source_start, copy.size) for copy in copies]
    for copy, part, dtype in zip(copies, parts, dtypes, strict=True):
        if dtype.itemsize == 1 and part.dtype is not dtype:
            raise TypeError(f"{copy.parameter} is {part.dtype} and must be quantised before it is sent as {dtype}")
    if len(parts) == 1 and parts[0].dtype is dtypes[0] and parts[0].is_contiguous():
        return parts[0].view(-1).view(torch.uint8)
    packed = staging.empty(sum(part.numel() * dtype.itemsize for part, dtype in zip(parts, dtypes, strict=True)))
    torch._foreach_copy_(_parts(copies, packed, dtypes), parts)  # hundreds of small ones
    return packed


def _parts(copies: Sequence[Copy], packed: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Where each copy lies in ``packed``; copies of one type lie together."""
    parts: list[Tensor] = []
    at = 0
    for dtype, run in itertools.groupby(zip(copies, dtypes, strict=True), key=lambda entry: entry[1]):
        sizes = [copy.size for copy, _ in run]
        numels = [math.prod(size) for size in sizes]
        end = at + sum(numels) * dtype.itemsize
        flat = packed[at:end].view(dtype).split(numels)
        parts += [part.view(size) for part, size in zip(flat, sizes, strict=True)]
        at = end
    return parts


def _digests(
    packed: Tensor, copies: Sequence[Copy], dtypes: Sequence[torch.dtype], detailed: bool
) -> list[tuple[int, int]]:
    parts = _parts(copies, packed, dtypes) if detailed else ()
    return [digest(packed), *(digest(part) for part in parts)]


def _tampered(names: Sequence[str], parts: Sequence[Tensor], tamper: Callable[[str, Tensor], Tensor]) -> Tensor:
    changed = [tamper(name, part) for name, part in zip(names, parts, strict=True)]
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in changed])


def _arrived(message: Message, buffer: Tensor, in_place: bool, work: Work) -> tuple[Message, Tensor, bool]:
    work.wait()
    return message, buffer, in_place


def hand_out(plan: SyncPlan, link: Link, place: int) -> None:
    """The source at ``place`` of an engine's group tells its part of the workers their schedules."""
    num_sources = len(plan.sources)
    for worker in range(place, len(plan.tensors), num_sources):
        text = torch.frombuffer(bytearray(Schedule.of(plan, worker).to_json().encode()), dtype=torch.uint8)
        length = torch.tensor([text.numel()], dtype=torch.int64).view(torch.uint8)
        link.send(length, num_sources + worker).wait()
        link.send(text, num_sources + worker).wait()


def receive_schedule(link: Link, worker: int, num_sources: int, device: torch.device) -> Schedule:
    """A worker's counterpart of :func:`hand_out`."""
    source = worker % num_sources
    length = torch.empty(8, dtype=torch.uint8, device=device)
    link.receive(length, source).wait()
    text = torch.empty(int(length.view(torch.int64).item()), dtype=torch.uint8, device=device)
    link.receive(text, source).wait()
    return Schedule.from_json(bytes(text.cpu().numpy()).decode())
