"""Megatron shards -> full Hugging Face tensors on every rank, in layer order.

The shards are packed into buckets of raw bytes.  For every bucket, on every rank:

    1. the owning stage's ranks pack their shards and a digest of each       [n] uint8
    2. TP all-gather inside the owning stage                                 [TP, n]
    3. PP broadcast of the gathered bucket from the owning stage             [TP, n]
    4. every rank compares each shard with its owner's digest, then puts the HF tensors together

So every rank of TP x PP runs the same collectives in the same order whatever it owns, and ends with the same bytes.
Who owns what is learned once, at construction.  The whole model never exists at once: consumed tensors are free to go.
A bucket's memory is fresh each time, because vLLM keeps views of what it was given until a layer is complete.

What is traded: every rank receives every byte, also those that its engine will cut away.  An engine that takes whole
tensors needs that; a plan that sends slices is what replaces it.  Expert parallelism is not covered (its experts live
on other ranks).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.model_map import ModelShape, ParameterSpec, hf_shapes, resolve_name, shard_shape, to_hf
from megatron_rest.weight_sync.digest import WORD_BYTES, digest_tensor

__all__ = ["MegatronWeightSource", "TensorMeta", "Traffic"]

_log = logging.getLogger(__name__)
_DIGEST_BYTES = 2 * WORD_BYTES
_ALIGNMENT = 16  # every shard starts on a multiple, so that any dtype can be viewed in place


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMeta:
    """What iteration will yield at this position."""

    name: str  # HF name
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes that all ranks of TP x PP together receive in one pass."""

    moved: int  # by the collectives
    needed: int  # what a rank's engine takes and the rank does not hold itself, summed over ranks with an engine each


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """One parameter inside a bucket: where its shard and its digest lie."""

    spec: ParameterSpec
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one TP shard
    offset: int
    num_bytes: int
    digest_offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bucket:
    """Consecutive parameters of one pipeline stage."""

    owner: int  # PP rank
    pieces: tuple[_Piece, ...]
    num_bytes: int  # of one TP rank, digests included


class MegatronWeightSource:
    """A re-iterable stream of ``(hf_name, full tensor)``; every rank of TP x PP iterates it together.

    Args:
        named_shards: returns this rank's parameters under their global Megatron names (layer offset added).  Called at
            construction and at the start of every pass; names that the table does not know are ignored.
        specs: the table, in the order in which tensors are sent (:func:`megatron_rest.model_map.parameter_map`).
        shape: the model's numbers.
        tp_group, pp_group: process groups; ``None`` means a group of one, never the default group.
        bucket_bytes: a bucket is closed when its full tensors reach this size; one tensor may be larger.
        dtype: floating-point shards are cast to it before they travel; ``None`` keeps each as it is.

    Collectives: construction runs one ``all_gather_object`` on ``pp_group``; a pass runs one
    ``all_gather_into_tensor`` on ``tp_group`` (owning stage) and one ``broadcast`` on ``pp_group`` a bucket.  An
    iterator must be exhausted: ranks that stop early leave their peers waiting.

    Raises ValueError at construction, on every rank of a pipeline, when a parameter has no owner, two owners or a
    wrong shape. A fault found during a pass does not raise (peers would wait): it is listed in :attr:`faults` when
    the pass is over.
    """

    def __init__(
        self,
        named_shards: Callable[[], Mapping[str, Tensor]],
        specs: Sequence[ParameterSpec],
        shape: ModelShape,
        *,
        tp_group: dist.ProcessGroup | None = None,
        pp_group: dist.ProcessGroup | None = None,
        bucket_bytes: int = 64 << 20,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._named_shards = named_shards
        self._shape = shape
        self._dtype = dtype
        self._tp_group, self._pp_group = tp_group, pp_group
        self._tp_size = 1 if tp_group is None else tp_group.size()
        self._tp_rank = 0 if tp_group is None else tp_group.rank()
        self._pp_rank = 0 if pp_group is None else pp_group.rank()
        owners = self._learn_owners(specs)
        self._buckets = _plan(specs, owners, shape, self._tp_size, bucket_bytes)
        self._device = next((t.device for t in named_shards().values()), torch.device("cpu"))
        self.faults: list[str] = []
        """HF names whose shards arrived with other bytes than their owner's digest; complete when a pass is over."""
        self.drifted: list[str] = []
        """Replicated or tied parameters whose copies were not bit-equal (TP rank 0's, the embedding's, is sent)."""

    def metadata(self) -> list[TensorMeta]:
        """Names, dtypes and full shapes in the order of iteration; computed locally, nothing is gathered."""
        return [
            TensorMeta(name=name, dtype=piece.dtype, shape=full)
            for bucket in self._buckets
            for piece in bucket.pieces
            for name, full in zip(piece.spec.hf_names, hf_shapes(piece.spec, self._shape), strict=True)
        ]

    def traffic(self) -> Traffic:
        """Bytes of one pass, from the plan alone.

        ``moved`` exceeds ``needed`` by digests, alignment, vocabulary padding and the copies of replicated parameters
        that TP gathers in order to compare them; all are small beside the matrices.
        """
        tp, pp = self._tp_size, 1 if self._pp_group is None else self._pp_group.size()
        received_a_byte = tp * (tp - 1) + (pp - 1) * tp * tp  # gather inside the owning stage, broadcast to the others
        moved = sum(bucket.num_bytes for bucket in self._buckets) * received_a_byte
        needed = 0
        for piece in (piece for bucket in self._buckets for piece in bucket.pieces):
            full = piece.dtype.itemsize * sum(torch.Size(s).numel() for s in hf_shapes(piece.spec, self._shape))
            held = full if piece.spec.shard_dim is not None else tp * full
            needed += tp * pp * full - held
        return Traffic(moved=moved, needed=needed)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(hf_name, tensor)`` on every rank; contiguous, on the shards' device, the receiver's to keep."""
        self.faults, self.drifted = [], []
        shards = self._named_shards()
        for bucket in self._buckets:
            gathered = self._gather(bucket, shards)
            self._check(bucket, gathered, shards)
            for piece in bucket.pieces:
                rows = range(self._tp_size) if piece.spec.shard_dim is not None else range(1)
                parts = [_view(gathered[row], piece) for row in rows]
                yield from to_hf(piece.spec, parts, shape=self._shape).items()
        if self.drifted:
            _log.warning("copies of the same parameter differ between ranks: %s", ", ".join(self.drifted))

    def worst_of_ranks(self, value: int) -> int:
        """Largest ``value`` over all ranks of TP x PP (one all-reduce a group): how ranks agree on what comes next."""
        worst = torch.tensor([value], dtype=torch.int64, device=self._device)
        for group in (self._tp_group, self._pp_group):
            if group is not None:
                dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
        return int(worst.item())

    def _learn_owners(self, specs: Sequence[ParameterSpec]) -> list[tuple[int, torch.dtype]]:
        """(PP rank, dtype on the wire) of every spec; the same on every rank."""
        local = self._named_shards()
        held: dict[int, torch.dtype] = {}
        errors: list[str] = []
        for index, spec in enumerate(specs):
            name = resolve_name(spec, local)
            if name is None:
                continue
            held[index] = self._wire_dtype(local[name].dtype)
            expected = shard_shape(spec, self._shape, self._tp_size)
            if tuple(local[name].shape) != expected:
                errors.append(
                    f"{name} has shape {tuple(local[name].shape)}, the table says {expected} at TP {self._tp_size}"
                )
        stages: list[tuple[dict[int, torch.dtype], list[str]]] = [(held, errors)]
        if self._pp_group is not None:
            gathered: list[tuple[dict[int, torch.dtype], list[str]] | None] = [None] * self._pp_group.size()
            dist.all_gather_object(gathered, (held, errors), group=self._pp_group)
            stages = [stage for stage in gathered if stage is not None]
        # Everything below is computed from the same data on every rank: all raise, or none.
        problems = [f"stage {rank}: {line}" for rank, (_, lines) in enumerate(stages) for line in lines]
        owners = []
        for index, spec in enumerate(specs):
            ranks = [rank for rank, (names, _) in enumerate(stages) if index in names]
            if len(ranks) != 1:
                problems.append(
                    f"{spec.megatron_name} is held by {len(ranks)} pipeline stages {ranks}, expected exactly one"
                )
                continue
            owners.append((ranks[0], stages[ranks[0]][0][index]))
        if problems:
            raise ValueError("the shards do not match the parameter table: " + "; ".join(problems[:8]))
        return owners

    def _wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def _gather(self, bucket: _Bucket, shards: Mapping[str, Tensor]) -> Tensor:
        """[TP, bucket.num_bytes] uint8 with every TP rank's packed shards, on every rank of TP x PP."""
        gathered = torch.empty(self._tp_size, bucket.num_bytes, dtype=torch.uint8, device=self._device)
        if bucket.owner == self._pp_rank:
            packed = gathered[0] if self._tp_group is None else torch.empty_like(gathered[0])
            self._pack(bucket, shards, packed)
            if self._tp_group is not None:
                dist.all_gather_into_tensor(gathered.view(-1), packed, group=self._tp_group)
        if self._pp_group is not None:
            dist.broadcast(gathered, group=self._pp_group, group_src=bucket.owner)
        return gathered

    def _pack(self, bucket: _Bucket, shards: Mapping[str, Tensor], packed: Tensor) -> None:
        for piece in bucket.pieces:
            packed[piece.offset + piece.num_bytes : piece.digest_offset].zero_()  # nothing uninitialised on the wire
            name = resolve_name(piece.spec, shards)
            assert name is not None  # learned at construction
            target = _view(packed, piece)
            target.copy_(shards[name].detach())
            _digest_view(packed, piece).copy_(digest_tensor(target))

    def _check(self, bucket: _Bucket, gathered: Tensor, shards: Mapping[str, Tensor]) -> None:
        sent = torch.stack([torch.stack([_digest_view(row, p) for p in bucket.pieces]) for row in gathered])
        got = torch.stack([torch.stack([digest_tensor(_view(row, p)) for p in bucket.pieces]) for row in gathered])
        is_wrong = (sent != got).any(-1).any(0).tolist()
        is_uneven = (sent != sent[:1]).any(-1).any(0).tolist()
        for piece, wrong, uneven in zip(bucket.pieces, is_wrong, is_uneven, strict=True):
            if wrong:
                self.faults += piece.spec.hf_names
            is_replica = piece.spec.shard_dim is None
            copies = [shards[name] for name in piece.spec.tied_copies if name in shards]
            mine = _view(gathered[self._tp_rank], piece)
            if (is_replica and uneven) or any(not torch.equal(copy.detach().to(mine.dtype), mine) for copy in copies):
                self.drifted.append(piece.spec.megatron_name)


def _plan(
    specs: Sequence[ParameterSpec],
    owners: Sequence[tuple[int, torch.dtype]],
    shape: ModelShape,
    tp_size: int,
    bucket_bytes: int,
) -> tuple[_Bucket, ...]:
    """Cut the parameters, in order, into buckets of one owner each.  Pure: the same on every rank."""
    buckets: list[_Bucket] = []
    pieces: list[_Piece] = []
    offset = 0

    def close(owner: int) -> None:
        nonlocal pieces, offset
        if pieces:
            buckets.append(_Bucket(owner=owner, pieces=tuple(pieces), num_bytes=offset))
        pieces, offset = [], 0

    previous = -1
    for spec, (owner, dtype) in zip(specs, owners, strict=True):
        if owner != previous or offset * tp_size >= bucket_bytes:
            close(previous)
        previous = owner
        local = shard_shape(spec, shape, tp_size)
        num_bytes = dtype.itemsize * torch.Size(local).numel()
        digest_offset = offset + -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        pieces.append(
            _Piece(spec=spec, dtype=dtype, shape=local, offset=offset, num_bytes=num_bytes, digest_offset=digest_offset)
        )
        offset = digest_offset + _DIGEST_BYTES
    close(previous)
    return tuple(buckets)


def _view(packed: Tensor, piece: _Piece) -> Tensor:
    return packed[piece.offset : piece.offset + piece.num_bytes].view(piece.dtype).view(piece.shape)


def _digest_view(packed: Tensor, piece: _Piece) -> Tensor:
    return packed[piece.digest_offset : piece.digest_offset + _DIGEST_BYTES].view(torch.int64)
