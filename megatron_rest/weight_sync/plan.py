"""Who sends which bytes to whom: pure data, made once from the two layouts, executed by any transport.

Both sides say where pieces of HF tensors lie in their own tensors (:class:`Placement`): a Megatron shard of
``linear_qkv`` holds the query, key and value rows of its groups one after another, vLLM's ``qkv_proj`` holds all
query rows above all key rows above all value rows.  A copy is the intersection of a placement of a training rank with
one of an engine's worker, so fused and split layouts, padded vocabularies, replicated key/value heads and experts need
no case of their own:

    training shards --training_placements--> boxes of HF tensors <--engine_tensors-- one vLLM worker's parameters
                                                    |
                                     copies: (source rank, box of its shard) -> (worker, box of its parameter)

A piece that several ranks hold (norms, data-parallel replicas) is sent by the one that has sent the least so far; every
element of a worker's parameter comes from exactly one rank, exactly once.  So bytes moved = bytes needed, except for
tensors that an engine only takes whole: those are delivered as full HF tensors to every worker, and
:meth:`SyncPlan.whole_bytes` says what that costs.

A matrix that an engine holds in FP8 travels in FP8, and its scales are one more tensor.  These no rank holds: senders
compute them before a transfer (fp8.py), and then every rank that holds a part of the matrix has all of its scales.

Copies are packed into messages of one (source, worker) pair; a large one travels alone, since it needs no packing where
both ends hold it in one piece.  The order of messages is the same for everybody, and sources take turns in it, so that
all links are busy and layers are complete early.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_rest.model_map import ModelShape, hf_shapes, parameter_map, resolve_name
from megatron_rest.weight_sync.layouts import EngineTensor, Fp8Form, Placement, Shard, training_placements

__all__ = ["Copy", "Message", "SyncPlan", "make_plan", "region"]

_ALONE_BYTES = 1 << 20  # a copy of this size gains nothing from company


@dataclass(frozen=True, slots=True)
class Copy:
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


@dataclass(slots=True)
class _Holders:
    """Everybody who holds one box of an HF tensor, and where."""

    box: Placement
    ranks: list[tuple[int, str, tuple[int, ...]]] = field(default_factory=list)  # (source rank, parameter, start)


def make_plan(
    shape: ModelShape,
    sources: Sequence[Mapping[str, Shard]],
    workers: Sequence[Sequence[EngineTensor]],
    *,
    form: Fp8Form | None = None,
    message_bytes: int = 64 << 20,
    load: Sequence[int] = (),
) -> SyncPlan:
    """The copies that fill ``workers`` from ``sources``.

    Args:
        shape: the model's numbers.
        sources: for every training rank its Megatron parameters (global names) and how TP cut them.
        workers: for every worker of one engine the tensors that it takes, each in the data type that travels.
        form: what of it is in FP8.
        message_bytes: a message is closed when it reaches this size.
        load: bytes that each source sends already (into other engines); replicas are chosen to even it out.

    Pure and deterministic: every rank that calls it with the same arguments gets the same plan.  Raises ValueError
    when a box that a worker needs is held by nobody.
    """
    held = _index_holders(shape, sources, form)
    sent = [*load] or [0] * len(sources)
    packer = _Packer(max(message_bytes, 1), _ALONE_BYTES)
    for position in range(max((len(t) for t in workers), default=0)):  # layer by layer, all workers alike
        for worker, tensors in enumerate(workers):
            if position >= len(tensors):
                continue
            tensor = tensors[position]
            itemsize = tensor.dtype.itemsize
            for wanted in tensor.placements:
                left = math.prod(wanted.size)
                for holders in held.get(wanted.hf_name, ()):
                    box = _intersection(holders.box, wanted)
                    if box is None:
                        continue
                    source, parameter, start = min(holders.ranks, key=lambda h: sent[h[0]])
                    copy = Copy(
                        parameter,
                        _shifted(start, box.hf_start, holders.box.hf_start),
                        position,
                        _shifted(wanted.start, box.hf_start, wanted.hf_start),
                        box.size,
                    )
                    sent[source] += itemsize * math.prod(box.size)
                    left -= math.prod(box.size)
                    packer.add(source, worker, copy, itemsize)
                if left:
                    raise ValueError(
                        f"{wanted.hf_name}: the training ranks hold {math.prod(wanted.size) - left} of the "
                        f"{math.prod(wanted.size)} elements that worker {worker} needs for {tensor.name}"
                    )
    return SyncPlan(
        tensors=tuple(tuple(t) for t in workers),
        messages=packer.messages(),
        form=form,
        sent_by=tuple(s - before for s, before in zip(sent, [*load] or [0] * len(sources), strict=True)),
    )


def _index_holders(
    shape: ModelShape, sources: Sequence[Mapping[str, Shard]], form: Fp8Form | None
) -> dict[str, list[_Holders]]:
    boxes: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], _Holders]] = {}

    def note(box: Placement, rank: int, parameter: str) -> None:
        holders = boxes.setdefault(box.hf_name, {}).setdefault((box.hf_start, box.size), _Holders(box))
        holders.ranks.append((rank, parameter, box.start))

    for spec in parameter_map(shape):
        scales: list[Placement] = []
        for matrix, size in zip(spec.hf_names, hf_shapes(spec, shape), strict=True):
            if form is not None and matrix in form.names:
                origin, grid = form.grid((0, 0), size)
                scales.append(Placement(form.scale_name(matrix), origin, origin, grid))
        for rank, parameters in enumerate(sources):
            name = resolve_name(spec, parameters)
            if name is None:
                continue
            shard = parameters[name]
            for placement in training_placements(spec, shape, shard.tp_rank, shard.tp_size):
                note(placement, rank, name)
            for whole in scales:
                note(whole, rank, whole.hf_name)
    return {name: list(parts.values()) for name, parts in boxes.items()}


class _Packer:
    """Copies into messages: one open message for every pair, in rounds, so that sources take turns."""

    def __init__(self, limit: int, alone: int) -> None:
        self._limit, self._alone = limit, alone  # bytes
        self._open: dict[tuple[int, int], list[tuple[int, Copy]]] = {}  # size of an element, copy
        self._sizes: dict[tuple[int, int], int] = {}
        self._rounds: dict[tuple[int, int], int] = {}
        self._closed: list[tuple[int, int, Message]] = []  # (round, position, message)

    def add(self, source: int, worker: int, copy: Copy, itemsize: int) -> None:
        pair = (source, worker)
        for part in _split(copy, self._limit // itemsize):
            num_bytes = itemsize * math.prod(part.size)
            is_alone = num_bytes >= self._alone
            if is_alone:
                self._close(pair)  # what came before it stays before it: layers are complete early
            self._open.setdefault(pair, []).append((itemsize, part))
            self._sizes[pair] = self._sizes.get(pair, 0) + num_bytes
            if is_alone or self._sizes[pair] >= self._limit:
                self._close(pair)

    def messages(self) -> tuple[Message, ...]:
        for pair in list(self._open):
            self._close(pair)
        return tuple(message for _, _, message in sorted(self._closed, key=lambda entry: entry[:2]))

    def _close(self, pair: tuple[int, int]) -> None:
        copies = sorted(self._open.pop(pair, []), key=lambda entry: -entry[0])
        if copies:
            turn = self._rounds.get(pair, 0)
            self._rounds[pair] = turn + 1
            message = Message(*pair, tuple(copy for _, copy in copies), self._sizes.pop(pair))
            self._closed.append((turn, len(self._closed), message))


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


def _intersection(a: Placement, b: Placement) -> Placement | None:
    begin = tuple(max(x, y) for x, y in zip(a.hf_start, b.hf_start, strict=True))
    ends = zip(a.hf_start, a.size, b.hf_start, b.size, strict=True)
    size = tuple(min(x + m, y + n) - low for (x, m, y, n), low in zip(ends, begin, strict=True))
    return Placement(a.hf_name, begin, begin, size) if min(size) > 0 else None


def _shifted(start: tuple[int, ...], to: tuple[int, ...], origin: tuple[int, ...]) -> tuple[int, ...]:
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
