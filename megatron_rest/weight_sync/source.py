"""Megatron shards -> full Hugging Face tensors on every rank, in layer order.

The shards are packed into buckets of raw bytes.  For every bucket, on every rank:

    1. the owning stage's ranks pack their shards and a digest of each       [n] uint8
    2. TP all-gather inside the owning stage                                 [TP, n]
       experts, which are never cut: EP broadcast from their owner           [1, n]
    3. PP broadcast of the gathered bucket from the owning stage
    4. every rank compares each shard with its owner's digest, then puts the HF tensors together

So every rank of TP x PP (and EP) runs the same collectives in the same order whatever it owns, and ends with the same
bytes.
Who owns what is learned once, at construction.  The whole model never exists at once: consumed tensors are free to go.
A bucket's memory is fresh each time, because vLLM keeps views of what it was given until a layer is complete.

What is traded: every rank receives every byte, also those that its engine will cut away.  An export and an engine of
TP 1 in every process need that; for other engines there is the transfer by slices (sliced.py), which asks the source
only for what a rank holds itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.model_map import ModelShape, ParameterSpec, hf_shapes, resolve_name, shard_shape, to_hf
from megatron_rest.weight_sync.digest import WORD_BYTES, digest, digest_tensor
from megatron_rest.weight_sync.layouts import Shard

__all__ = ["MegatronWeightSource", "TensorMeta"]

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


@dataclass(frozen=True, slots=True)
class _Owner:
    """Who holds a parameter: a pipeline stage, of experts one EP rank in it."""

    pp_rank: int
    ep_rank: int | None = None


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

    owner: _Owner
    pieces: tuple[_Piece, ...]
    num_bytes: int  # of one TP rank, digests included


class MegatronWeightSource:
    """A re-iterable stream of ``(hf_name, full tensor)``; every rank of TP x PP iterates it together.

    Args:
        named_shards: returns this rank's parameters under their global Megatron names (layer offset added).  Called at
            construction and at the start of every pass; names that the table does not know are ignored.
        specs: the table, in the order in which tensors are sent (:func:`megatron_rest.model_map.parameter_map`).
        shape: the model's numbers.
        tp_group, pp_group, ep_group: process groups; ``None`` means a group of one, never the default group.
        all_ranks: group of all ranks that take part in a transfer by slices (with data-parallel replicas these share
            the sending); ``None`` means TP x PP.
        bucket_bytes: a bucket is closed when its full tensors reach this size; one tensor may be larger.
        dtype: floating-point shards are cast to it before they travel; ``None`` keeps each as it is.

    Collectives: construction runs one ``all_gather_object`` on ``ep_group`` and one on ``pp_group``; a pass runs one
    ``all_gather_into_tensor`` on ``tp_group`` (owning stage; experts: a ``broadcast`` on ``ep_group``) and one
    ``broadcast`` on ``pp_group`` a bucket.  An
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
        ep_group: dist.ProcessGroup | None = None,
        all_ranks: dist.ProcessGroup | None = None,
        bucket_bytes: int = 64 << 20,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._named_shards = named_shards
        self.shape = shape
        self.specs = tuple(specs)
        self._dtype = dtype
        self._tp_group, self._pp_group, self._ep_group, self._all_ranks = tp_group, pp_group, ep_group, all_ranks
        self._tp_size = 1 if tp_group is None else tp_group.size()
        self._tp_rank = 0 if tp_group is None else tp_group.rank()
        self._pp_rank = 0 if pp_group is None else pp_group.rank()
        self._ep_rank = 0 if ep_group is None else ep_group.rank()
        owners = self._learn_owners(specs)
        self._buckets = _plan(specs, owners, shape, self._tp_size, bucket_bytes)
        self.device = next((t.device for t in named_shards().values()), torch.device("cpu"))
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
            for name, full in zip(piece.spec.hf_names, hf_shapes(piece.spec, self.shape), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(hf_name, tensor)`` on every rank; contiguous, on the shards' device, the receiver's to keep."""
        self.faults, self.drifted = [], []
        shards = self._named_shards()
        for bucket in self._buckets:
            gathered = self._gather(bucket, shards)
            self._check(bucket, gathered, shards)
            for piece in bucket.pieces:
                rows = range(len(gathered)) if piece.spec.shard_dim is not None else range(1)
                parts = [_view(gathered[row], piece) for row in rows]
                yield from to_hf(piece.spec, parts, shape=self.shape).items()
        self._warn_of_drift()

    def worst_of_ranks(self, value: int) -> int:
        """Largest ``value`` over all ranks (one all-reduce a group): how ranks agree on what comes next."""
        worst = torch.tensor([value], dtype=torch.int64, device=self.device)
        for group in (self._tp_group, self._pp_group, self._ep_group, self._all_ranks):
            if group is not None:
                dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
        return int(worst.item())

    # What a transfer by slices asks for ---------------------------------------------------------------------------

    def max_over_tp(self, tensors: Sequence[Tensor]) -> None:
        """Elementwise maximum over the TP ranks, in place; float32, the same shapes on each of them, one all-reduce."""
        if self._tp_group is None or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=self._tp_group)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    @property
    def rank(self) -> int:
        """Number of this rank in the order of :meth:`all_gather`."""
        return self._all_ranks.rank() if self._all_ranks is not None else self._pp_rank * self._tp_size + self._tp_rank

    def all_gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank; ``all_gather_object`` on the group of all, or on TP and PP."""
        if self._all_ranks is not None:
            return _all_gather(value, self._all_ranks)
        stages = _all_gather(_all_gather(value, self._tp_group), self._pp_group)
        return [of_rank for stage in stages for of_rank in stage]

    def holdings(self) -> dict[str, Shard]:
        """How this rank's parameters are cut."""
        local = self._named_shards()
        names = {spec: resolve_name(spec, local) for spec in self.specs}
        return {name: self.shard(spec) for spec, name in names.items() if name is not None}

    def shard(self, spec: ParameterSpec) -> Shard:
        """How a parameter is cut where this rank holds it: experts never are."""
        return Shard(self._tp_rank, self._tp_size) if spec.expert is None else Shard(0, 1)

    def local_shards(self) -> dict[str, Tensor]:
        """This rank's live parameters: what is read must be read before training goes on."""
        return dict(self._named_shards())

    def replica_digests(self, shards: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, int]]]:
        """Of parameters that other ranks hold too and training must keep equal: norms, routers, tied embeddings."""
        digests = []
        for spec in self.specs:
            is_replica = spec.shard_dim is None and spec.expert is None
            key = spec.megatron_name if is_replica else f"{spec.megatron_name}/{self._tp_rank}"
            if is_replica or spec.tied_copies:
                names = (resolve_name(spec, shards), *spec.tied_copies)
                digests += [(key, digest(shards[name])) for name in names if name is not None and name in shards]
        return digests

    def note_drift(self, of_ranks: Sequence[Sequence[tuple[str, tuple[int, int]]]]) -> None:
        """Compare what :meth:`replica_digests` gave on every rank; differences go to :attr:`drifted`."""
        seen: dict[str, tuple[int, int]] = {}
        pairs = [pair for digests in of_ranks for pair in digests]
        drifted = [key for key, value in pairs if seen.setdefault(key, value) != value]
        self.drifted = list(dict.fromkeys(key.split("/")[0] for key in drifted))
        self._warn_of_drift()

    def _warn_of_drift(self) -> None:
        if self.drifted:
            _log.warning("copies of the same parameter differ between ranks: %s", ", ".join(self.drifted))

    # Who holds what -----------------------------------------------------------------------------------------------

    def _learn_owners(self, specs: Sequence[ParameterSpec]) -> list[tuple[_Owner, torch.dtype]]:
        """Owner and data type on the wire of every spec; the same on every rank."""
        local = self._named_shards()
        held: dict[int, torch.dtype] = {}
        errors: list[str] = []
        for index, spec in enumerate(specs):
            name = resolve_name(spec, local)
            if name is None:
                continue
            held[index] = self._wire_dtype(local[name].dtype)
            expected = shard_shape(spec, self.shape, self._tp_size)
            if tuple(local[name].shape) != expected:
                errors.append(
                    f"{name} has shape {tuple(local[name].shape)}, the table says {expected} at TP {self._tp_size}"
                )
        stages = _all_gather(_all_gather((held, errors), self._ep_group), self._pp_group)
        # Everything below is computed from the same data on every rank: all raise, or none.
        problems = [
            f"stage {rank}: {line}" for rank, stage in enumerate(stages) for _, lines in stage for line in lines
        ]
        owners = []
        for index, spec in enumerate(specs):
            where = [
                (pp, ep) for pp, stage in enumerate(stages) for ep, (names, _) in enumerate(stage) if index in names
            ]
            ranks = sorted({pp for pp, _ in where})
            if len(ranks) != 1:
                problems.append(
                    f"{spec.megatron_name} is held by {len(ranks)} pipeline stages {ranks}, expected exactly one"
                )
                continue
            pp, ep = where[0]
            if len(where) != (1 if spec.expert is not None else len(stages[pp])):
                problems.append(
                    f"{spec.megatron_name} is held by {len(where)} of {len(stages[pp])} EP ranks of stage {pp}"
                )
                continue
            owners.append((_Owner(pp, ep if spec.expert is not None else None), stages[pp][ep][0][index]))
        if problems:
            raise ValueError("the shards do not match the parameter table: " + "; ".join(problems[:8]))
        return owners

    def _wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def _gather(self, bucket: _Bucket, shards: Mapping[str, Tensor]) -> Tensor:
        """uint8 [TP, bucket.num_bytes] with every TP rank's packed shards, [1, ...] of experts, on every rank."""
        is_expert = bucket.owner.ep_rank is not None
        rows = 1 if is_expert else self._tp_size
        gathered = torch.empty(rows, bucket.num_bytes, dtype=torch.uint8, device=self.device)
        if bucket.owner.pp_rank == self._pp_rank and is_expert:
            if bucket.owner.ep_rank == self._ep_rank:
                self._pack(bucket, shards, gathered[0])
            if self._ep_group is not None:
                dist.broadcast(gathered, group=self._ep_group, group_src=bucket.owner.ep_rank)
        elif bucket.owner.pp_rank == self._pp_rank:
            packed = gathered[0] if self._tp_group is None else torch.empty_like(gathered[0])
            self._pack(bucket, shards, packed)
            if self._tp_group is not None:
                dist.all_gather_into_tensor(gathered.view(-1), packed, group=self._tp_group)
        if self._pp_group is not None:
            dist.broadcast(gathered, group=self._pp_group, group_src=bucket.owner.pp_rank)
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
            mine = _view(gathered[self._tp_rank % len(gathered)], piece)
            if (is_replica and uneven) or any(not torch.equal(copy.detach().to(mine.dtype), mine) for copy in copies):
                self.drifted.append(piece.spec.megatron_name)


def _plan(
    specs: Sequence[ParameterSpec],
    owners: Sequence[tuple[_Owner, torch.dtype]],
    shape: ModelShape,
    tp_size: int,
    bucket_bytes: int,
) -> tuple[_Bucket, ...]:
    """Cut the parameters, in order, into buckets of one owner each.  Pure: the same on every rank."""
    buckets: list[_Bucket] = []
    pieces: list[_Piece] = []
    offset = 0

    def close(owner: _Owner | None) -> None:
        nonlocal pieces, offset
        if pieces and owner is not None:
            buckets.append(_Bucket(owner=owner, pieces=tuple(pieces), num_bytes=offset))
        pieces, offset = [], 0

    previous: _Owner | None = None
    for spec, (owner, dtype) in zip(specs, owners, strict=True):
        rows = tp_size if owner.ep_rank is None else 1
        if owner != previous or offset * rows >= bucket_bytes:
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


def _all_gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
