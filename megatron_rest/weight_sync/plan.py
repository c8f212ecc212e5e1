"""Who sends which bytes to whom: pure data, made once from the two layouts, executed by any transport.

Both sides say where pieces of HF tensors lie in their own tensors (:class:`Placement`): a Megatron shard of
``linear_qkv`` holds the query, key and value rows of its groups one after another, vLLM's ``qkv_proj`` holds all
query rows above all key rows above all value rows.  A copy is the intersection of a placement of a training rank with
one of an engine's worker, so fused and split layouts, padded vocabularies, replicated key/value heads and experts need
no case of their own:

    training shards --training_placements--> boxes of HF tensors <--engine_tensors-- one vLLM worker's parameters
                                                    |
                                     copies: (source rank, box of its shard) -> (worker, box of its parameter)

A piece that several ranks hold (a norm, a TP shard beside other experts) is sent by the one that has sent the least so
far; every element of a worker's parameter comes from exactly one rank, exactly once.  So bytes moved = bytes needed,
except for tensors that an engine only takes whole: those are delivered as full HF tensors to every worker, and
:meth:`SyncPlan.whole_bytes` says what that costs.

Data-parallel replicas make several copies of the model.  An engine is fed by as few of them as keep up with its network
cards, and engines take turns: few ranks then talk to an engine, and engines that are laid out alike share one plan in
which only the senders' numbers differ (:func:`make_plans`).

A matrix that an engine holds in FP8 travels in FP8, and its scales are one more tensor.  These no rank holds: senders
compute them before a transfer (fp8.py), and then every rank that holds a part of the matrix has all of its scales.

Copies are packed into messages of one (source, worker) pair; a large one travels alone, since it needs no packing where
both ends hold it in one piece.  The order of messages is the same for everybody: rounds in which every pair has one
message, and in a round the sources begin with different workers, so that all links are busy and layers are complete
early.  What is small travels in the round in which its message was begun, so no layer waits for its norm.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from megatron_rest.model_map import ModelShape, ParameterSpec, hf_shapes, parameter_map
from megatron_rest.weight_sync.layouts import EngineTensor, Fp8Form, Placement, Shard, training_placements
from megatron_rest.weight_sync.limits import PACKED_BYTES

__all__ = ["Copy", "Message", "SyncPlan", "make_plan", "make_plans", "region", "without_collector"]

_ALONE_BYTES = 16 << 20  # a copy of this size gains nothing from company
_SPAN = 4  # a packed message collects over so many times its limit of what its pair sends: the worker's open tensors
_AS_FAST = 1.02  # fewer copies of the model may feed an engine where that takes at most so much longer


class Copy(NamedTuple):  # there are hundreds of thousands
    """One box of a source's shard into one box of a worker's tensor; both hold the same ``size``."""

    parameter: str  # Megatron name at the source
    source_start: tuple[int, ...]
    tensor: int  # index into the worker's tensors
    start: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """Consecutive copies of one (source, worker) pair, packed without gaps; the widest data type first aligns all."""

    source: int
    worker: int
    copies: tuple[Copy, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncPlan:
    """All messages of a transfer into one engine, in the order in which everybody handles them."""

    tensors: tuple[tuple[EngineTensor, ...], ...]  # of each worker
    messages: tuple[Message, ...]
    form: Fp8Form | None = None  # what senders quantise
    sent_by: tuple[int, ...] = field(default=())  # bytes leaving each source rank

    @property
    def sources(self) -> tuple[int, ...]:
        """Ranks that send, in order: the engine's transfer group is these and its workers."""
        return tuple(rank for rank, num_bytes in enumerate(self.sent_by) if num_bytes)

    def pairs(self) -> dict[tuple[int, int], list[int]]:
        """Positions of the messages of every (source, worker)."""
        found: dict[tuple[int, int], list[int]] = {}
        for position, message in enumerate(self.messages):
            found.setdefault((message.source, message.worker), []).append(position)
        return found

    @property
    def moved_bytes(self) -> int:
        return sum(m.num_bytes for m in self.messages)

    @property
    def needed_bytes(self) -> int:
        """What the workers hold: each its own slices once."""
        return sum(t.covered_bytes for tensors in self.tensors for t in tensors)

    @property
    def whole_bytes(self) -> int:
        """Of ``needed_bytes``: full tensors that go to every worker, because the engine takes no slices of them."""
        return sum(t.covered_bytes for tensors in self.tensors for t in tensors if t.is_whole)

    def targets(self, message: Message) -> list[EngineTensor]:
        """The tensor that each copy of a message writes to."""
        return [self.tensors[message.worker][copy.tensor] for copy in message.copies]

    def received_by(self) -> tuple[int, ...]:
        """Bytes reaching each worker."""
        totals = [0] * len(self.tensors)
        for message in self.messages:
            totals[message.worker] += message.num_bytes
        return tuple(totals)


class _Piece(NamedTuple):
    """What a wanted box of an HF tensor gets of one that is held."""

    source_start: tuple[int, ...]
    start: tuple[int, ...]  # in the worker's tensor
    size: tuple[int, ...]
    numel: int
    num_wanted: int  # elements of the wanted box


_Geometry = tuple[tuple[int, ...], ...]  # a Placement without its name


@dataclass(slots=True)
class _Holders:
    """Everybody who holds one box of an HF tensor in the same place of a shard."""

    box: Placement
    pieces: dict[_Geometry, _Piece | None]  # asked for before, of boxes with this geometry: layers are alike
    ranks: list[tuple[int, str]] = field(default_factory=list)  # source rank, parameter

    def part_of(self, wanted: Placement) -> _Piece | None:
        """None: nothing."""
        geometry = wanted[1:]
        try:
            return self.pieces[geometry]
        except KeyError:
            piece = self.pieces[geometry] = _piece(self.box, wanted)
            return piece


def make_plans(
    shape: ModelShape,
    sources: Sequence[Mapping[str, Shard]],
    engines: Sequence[tuple[Sequence[Sequence[EngineTensor]], Fp8Form | None]],
    *,
    message_bytes: int = 64 << 20,
) -> list[SyncPlan]:
    """A plan for every engine; arguments as for :func:`make_plan`, ``engines`` with the tensors of each one's workers.

    Pure and deterministic.  Engines with the same tensors (the same object, or equal ones) are planned once.
    """
    with without_collector():
        return _make_plans(shape, sources, engines, message_bytes)


@contextmanager
def without_collector() -> Iterator[None]:
    """Hundreds of thousands of tuples are made, none of them garbage: looking for some takes as long as making them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _make_plans(
    shape: ModelShape,
    sources: Sequence[Mapping[str, Shard]],
    engines: Sequence[tuple[Sequence[Sequence[EngineTensor]], Fp8Form | None]],
    message_bytes: int,
) -> list[SyncPlan]:
    peers = _peers(sources)
    num_copies = min((len(ranks) for ranks in peers), default=1)
    num_workers = max((len(workers) for workers, _ in engines), default=1)
    used = _copies_used(num_copies, len(peers), len(engines), num_workers)
    seats = [ranks[copy] for ranks in peers for copy in range(used)]
    held = [sources[rank] for rank in seats]
    made: list[tuple[tuple[Sequence[Sequence[EngineTensor]], Fp8Form | None], SyncPlan]] = []
    plans = []
    for index, engine in enumerate(engines):
        plan = next((plan for known, plan in made if _is_same(known, engine)), None)
        if plan is None:
            plan = make_plan(shape, held, engine[0], form=engine[1], message_bytes=message_bytes)
            made.append((engine, plan))
        ranks = [of_class[(index * used + copy) % num_copies] for of_class in peers for copy in range(used)]
        plans.append(_seated(plan, ranks, len(sources)))
    return plans


def _is_same(known: tuple[object, object], engine: tuple[object, object]) -> bool:
    return known[0] is engine[0] or known == engine


def _peers(sources: Sequence[Mapping[str, Shard]]) -> list[list[int]]:
    """Ranks that hold the same parameters: one of each list makes a whole copy of the model."""
    same: dict[frozenset[tuple[str, Shard]], list[int]] = {}
    for rank, parameters in enumerate(sources):
        if parameters:
            same.setdefault(frozenset(parameters.items()), []).append(rank)
    return list(same.values())


def _copies_used(num_copies: int, ranks_per_copy: int, num_engines: int, num_workers: int) -> int:
    """How many copies of the model feed one engine: as few as are as fast as all of them."""

    def seconds(used: int) -> float:
        """Of the busiest network card, in copies of the model a card."""
        engines_of_a_copy = -(-num_engines * used // num_copies)
        return max(engines_of_a_copy / (used * ranks_per_copy), 1 / num_workers)

    choices = range(1, num_copies + 1)
    best = min(map(seconds, choices))
    return next(used for used in choices if seconds(used) <= _AS_FAST * best)


def _seated(plan: SyncPlan, ranks: Sequence[int], num_ranks: int) -> SyncPlan:
    """The plan with the sender in place ``i`` being ``ranks[i]``."""
    sent = [0] * num_ranks
    for rank, num_bytes in zip(ranks, plan.sent_by, strict=True):
        sent[rank] = num_bytes
    messages = tuple(Message(ranks[m.source], m.worker, m.copies, m.num_bytes) for m in plan.messages)
    return replace(plan, messages=messages, sent_by=tuple(sent))


def make_plan(
    shape: ModelShape,
    sources: Sequence[Mapping[str, Shard]],
    workers: Sequence[Sequence[EngineTensor]],
    *,
    form: Fp8Form | None = None,
    message_bytes: int = 64 << 20,
) -> SyncPlan:
    """The copies that fill ``workers`` from ``sources``, all of which share the sending.

    Args:
        shape: the model's numbers.
        sources: for every training rank its Megatron parameters (global names) and how TP cut them.
        workers: for every worker of one engine the tensors that it takes, each in the data type that travels.
        form: what of it is in FP8.
        message_bytes: a message is closed when it reaches this size, a packed one at 64 MiB if that is less.

    Pure and deterministic: every rank that calls it with the same arguments gets the same plan.  Raises ValueError
    when a box that a worker needs is held by nobody.
    """
    held = _index_holders(shape, sources, form)
    sent = [0] * len(sources)
    packer = _Packer(max(message_bytes, 1), _ALONE_BYTES, len(sources), len(workers))
    for position in range(max((len(t) for t in workers), default=0)):  # layer by layer, all workers alike
        for worker, tensors in enumerate(workers):
            if position >= len(tensors):
                continue
            tensor = tensors[position]
            itemsize = tensor.dtype.itemsize
            for wanted in tensor.placements:
                found, num_wanted = 0, -1
                for holders in held.get(wanted.hf_name, ()):
                    piece = holders.part_of(wanted)
                    if piece is None:
                        continue
                    ranks = holders.ranks
                    source, parameter = ranks[0] if len(ranks) == 1 else min(ranks, key=lambda holder: sent[holder[0]])
                    sent[source] += itemsize * piece.numel
                    found += piece.numel
                    num_wanted = piece.num_wanted
                    copy = Copy(parameter, piece.source_start, position, piece.start, piece.size)
                    packer.add(source, worker, copy, itemsize, itemsize * piece.numel)
                if found != num_wanted:
                    raise ValueError(
                        f"{wanted.hf_name}: the training ranks hold {found} of the {math.prod(wanted.size)} elements "
                        f"that worker {worker} needs for {tensor.name}"
                    )
    return SyncPlan(
        tensors=tuple(tuple(t) for t in workers),
        messages=packer.messages(),
        form=form,
        sent_by=tuple(sent),
    )


def _index_holders(
    shape: ModelShape, sources: Sequence[Mapping[str, Shard]], form: Fp8Form | None
) -> dict[str, list[_Holders]]:
    specs = {name: spec for spec in parameter_map(shape) for name in (spec.megatron_name, *spec.alternatives)}
    held: dict[str, dict[_Geometry, _Holders]] = {}
    pieces: dict[_Geometry, dict[_Geometry, _Piece | None]] = {}
    known: dict[tuple[Any, ...], list[tuple[int, _Geometry]]] = {}

    def add(rank: int, parameter: str, hf_name: str, geometry: _Geometry) -> None:
        boxes = held.setdefault(hf_name, {})
        holders = boxes.get(geometry)
        if holders is None:
            holders = boxes[geometry] = _Holders(Placement(hf_name, *geometry), pieces.setdefault(geometry, {}))
        holders.ranks.append((rank, parameter))

    for rank, parameters in enumerate(sources):
        for name, shard in parameters.items():
            spec = specs.get(name)
            if spec is None:
                continue
            key = (*_likeness(spec), shard)
            placements = known.get(key)
            if placements is None:
                placements = known[key] = [
                    (spec.hf_names.index(box.hf_name), box[1:])
                    for box in training_placements(spec, shape, shard.tp_rank, shard.tp_size)
                ]
            for index, geometry in placements:
                add(rank, name, spec.hf_names[index], geometry)
            if form is None:
                continue
            # Scales lie nowhere in a shard: who holds a part of the matrix has all of them under their HF name.
            for matrix, size in zip(spec.hf_names, hf_shapes(spec, shape), strict=True):
                if matrix in form.names:
                    origin, grid = form.grid((0, 0), size)
                    add(rank, form.scale_name(matrix), form.scale_name(matrix), (origin, origin, grid))
    return {name: list(boxes.values()) for name, boxes in held.items()}


def _likeness(spec: ParameterSpec) -> tuple[Any, ...]:
    """The same for parameters that differ in their layer or expert alone, which all lie alike in their shards."""
    return (spec.kind, spec.shard_dim, spec.expert is None, *spec.hf_names[0].rsplit(".", 2)[1:])


@dataclass(slots=True)
class _Open:
    """A message that still grows."""

    turn: int
    position: int  # among all messages, by when they were begun
    span: int  # bytes that its pair has sent when it must close
    copies: dict[int, list[Copy]] = field(default_factory=dict)  # by the size of an element
    num_bytes: int = 0


@dataclass(slots=True)
class _Pair:
    """What goes from one source to one worker."""

    source: int
    worker: int
    sent: int = 0  # bytes so far
    turns: int = 0  # messages so far
    open: _Open | None = None


class _Packer:
    """Copies into messages: one open message for every pair, in rounds, so that sources take turns."""

    def __init__(self, limit: int, alone: int, num_sources: int, num_workers: int) -> None:
        self._limit, self._alone, self._num_sources, self._num_workers = limit, alone, num_sources, num_workers
        self._packed = min(limit, PACKED_BYTES)
        self._pairs: dict[tuple[int, int], _Pair] = {}
        self._begun = 0
        self._closed: list[tuple[tuple[int, int, int], Message]] = []

    def add(self, source: int, worker: int, copy: Copy, itemsize: int, num_bytes: int) -> None:
        if num_bytes > self._limit and copy.size[0] > 1:  # rows are not split
            for part in _split(copy, self._limit // itemsize):
                self.add(source, worker, part, itemsize, itemsize * math.prod(part.size))
            return
        pair = self._pairs.get((source, worker))
        if pair is None:
            pair = self._pairs[source, worker] = _Pair(source, worker)
        sent = pair.sent = pair.sent + num_bytes
        message = pair.open
        if num_bytes >= self._alone:
            alone = self._begin(pair, span=0)
            alone.copies[itemsize], alone.num_bytes = [copy], num_bytes
            self._close(pair, alone)
        else:
            if message is None:
                message = pair.open = self._begin(pair, span=sent + _SPAN * self._packed)
            copies = message.copies.get(itemsize)
            if copies is None:
                message.copies[itemsize] = [copy]
            else:
                copies.append(copy)
            message.num_bytes += num_bytes
        if message is not None and (message.num_bytes >= self._packed or sent >= message.span):
            pair.open = None
            self._close(pair, message)

    def messages(self) -> tuple[Message, ...]:
        for pair in self._pairs.values():
            if pair.open is not None:
                self._close(pair, pair.open)
                pair.open = None
        return tuple(message for _, message in sorted(self._closed, key=lambda entry: entry[0]))

    def _begin(self, pair: _Pair, *, span: int) -> _Open:
        self._begun += 1
        pair.turns += 1
        return _Open(turn=pair.turns, position=self._begun, span=span)

    def _close(self, pair: _Pair, message: _Open) -> None:
        copies = [copy for _, some in sorted(message.copies.items(), reverse=True) for copy in some]
        # Neighbours begin with the same worker, so that it hears at once of sources whose lanes differ (links.Lanes).
        first = pair.source * self._num_workers // self._num_sources
        key = (message.turn, (pair.worker - first) % self._num_workers, message.position)
        self._closed.append((key, Message(pair.source, pair.worker, tuple(copies), message.num_bytes)))


def _split(copy: Copy, limit: int) -> Iterator[Copy]:
    """Rows of a copy in parts of about ``limit`` elements: the embedding of a large model is one copy of gigabytes."""
    rows, row = copy.size[0], math.prod(copy.size[1:])
    step = max(limit // max(row, 1), 1)
    at_source, at = len(copy.source_start) - len(copy.size), len(copy.start) - len(copy.size)
    for begin in range(0, rows, step):
        size = (min(step, rows - begin), *copy.size[1:])
        yield Copy(
            copy.parameter,
            _moved(copy.source_start, at_source, begin),
            copy.tensor,
            _moved(copy.start, at, begin),
            size,
        )


def _moved(start: tuple[int, ...], dim: int, by: int) -> tuple[int, ...]:
    return (*start[:dim], start[dim] + by, *start[dim + 1 :])


def _piece(held: Placement, wanted: Placement) -> _Piece | None:
    begin, size = [], []
    for x, m, y, n in zip(held.hf_start, held.size, wanted.hf_start, wanted.size, strict=True):
        low, high = max(x, y), min(x + m, y + n)
        if high <= low:
            return None
        begin.append(low)
        size.append(high - low)
    return _Piece(
        source_start=_shifted(held.start, begin, held.hf_start),
        start=_shifted(wanted.start, begin, wanted.hf_start),
        size=tuple(size),
        numel=math.prod(size),
        num_wanted=math.prod(wanted.size),
    )


def _shifted(start: tuple[int, ...], to: Sequence[int], origin: tuple[int, ...]) -> tuple[int, ...]:
    lead = len(start) - len(to)
    return (*start[:lead], *(s + t - o for s, t, o in zip(start[lead:], to, origin, strict=True)))


def region(tensor: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """The box of ``tensor`` at ``start`` as a view; leading dimensions that ``size`` lacks are indices."""
    lead = len(start) - len(size)
    for index in start[:lead]:
        tensor = tensor[index]
    for dim, (begin, length) in enumerate(zip(start[lead:], size, strict=True)):
        tensor = tensor.narrow(dim, begin, length)
    return tensor
