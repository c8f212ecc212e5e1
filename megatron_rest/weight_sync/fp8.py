"""FP8 on the sender: matrices leave the trainer as e4m3 with a float32 scale for every block.

    scale = max |w| over the block / 448        448 is the largest e4m3 number
    q     = w / scale, rounded to e4m3          so w is at most half a step of e4m3 away: 1/16 of |w|, or 2**-10 scale

Where an engine's kernels multiply by powers of two (DeepGEMM's E8M0, vLLM's default on Hopper and Blackwell), a scale
is rounded up to one before the division: vLLM quantises anew what has another scale, and would round a second time.

The form is that of a checkpoint in FP8 (:class:`~megatron_rest.weight_sync.layouts.Fp8Form`), so an engine loads it as
such a checkpoint, and half of the bytes travel.  Blocks belong to the whole HF matrix.  Where TP cuts through one, the
ranks agree on its largest element first, one all-reduce for all matrices of a rank: every cut gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rest.model_map import hf_shapes, resolve_name
from megatron_rest.weight_sync.layouts import Fp8Form, Placement, training_placements
from megatron_rest.weight_sync.plan import region
from megatron_rest.weight_sync.source import MegatronWeightSource

__all__ = ["E4M3_MAX", "QuantisedShards", "quantise", "quantised_stream"]

E4M3_MAX = 448.0
_CHUNK_CPU, _CHUNK_GPU = 1 << 17, 1 << 26  # elements
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a block of zeros; dividing by a subnormal would overflow


def quantise(matrix: Tensor, form: Fp8Form) -> tuple[Tensor, Tensor]:
    """A whole HF matrix [rows, columns] as e4m3 of its shape and float32 scales, one for every block of ``form``.

    Not differentiable; no collectives.  A block with NaN or infinity gets an infinite scale.
    """
    largest = _largest(matrix, (0, 0), form)
    scale = _scale_of(largest, form)
    return _divided(matrix, (0, 0), scale, form), scale


def quantised_stream(
    stream: Iterator[tuple[str, Tensor]], form: Fp8Form, non_finite: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Whole HF tensors with each matrix of ``form`` in FP8, its scales behind it.

    The names of matrices with NaN or infinity are added to ``non_finite``: raising here would end a stream whose
    gathers other ranks take part in.
    """
    for name, tensor in stream:
        if name not in form.names:
            yield name, tensor
            continue
        quantised, scale = quantise(tensor, form)
        if not bool(scale.isfinite().all()):
            non_finite.append(name)
        yield name, quantised
        yield form.scale_name(name), scale


class QuantisedShards(Mapping[str, Tensor]):
    """A rank's parameters as an engine in FP8 wants them, laid out as Megatron holds them.

    A matrix of ``form`` is e4m3 of its shard's shape, quantised when it is first asked for and kept (half of the bytes
    of what this rank holds in bfloat16, until this object goes).  The scales of every such matrix that this rank holds
    a part of are there under their HF names, whole.  All else is the live parameter.

    Collectives: construction runs one ``all_reduce`` on the source's TP group, where that has more than one rank.

    Attributes:
        non_finite: HF names of matrices with NaN or infinity in a part that this rank's TP group holds.
    """

    def __init__(self, source: MegatronWeightSource, shards: Mapping[str, Tensor], form: Fp8Form) -> None:
        self._shards, self._form = shards, form
        self._boxes: dict[str, list[Placement]] = {}  # of the parameters that are quantised
        self._done: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        cut: list[str] = []  # matrices of which other TP ranks hold other parts
        for spec in source.specs:
            name, shard = resolve_name(spec, shards), source.shard(spec)
            if name is None or form.names.isdisjoint(spec.hf_names):
                continue
            boxes = list(training_placements(spec, source.shape, shard.tp_rank, shard.tp_size))
            self._boxes[name] = boxes
            for matrix, size in zip(spec.hf_names, hf_shapes(spec, source.shape), strict=True):
                grid = form.grid((0, 0), size)[1]
                largest[matrix] = torch.zeros(grid, dtype=torch.float32, device=shards[name].device)
                if shard.tp_size > 1:
                    cut.append(matrix)
            for box in boxes:
                at, count = form.grid(box.hf_start, box.size)
                part = region(shards[name].detach(), box.start, box.size)
                target = region(largest[box.hf_name], at, count)
                target.copy_(torch.maximum(target, _largest(part, box.hf_start, form)))
        source.max_over_tp([largest[matrix] for matrix in cut])
        self._scales = {form.scale_name(matrix): _scale_of(value, form) for matrix, value in largest.items()}
        is_finite = torch.stack([scale.isfinite().all() for scale in self._scales.values()]).tolist() if largest else []
        self.non_finite = [name for name, fine in zip(largest, is_finite, strict=True) if not fine]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._scales:
            return self._scales[name]
        if name not in self._boxes:
            return self._shards[name]
        if name not in self._done:
            shard = self._shards[name].detach()
            quantised = torch.empty(shard.shape, dtype=torch.float8_e4m3fn, device=shard.device)
            for box in self._boxes[name]:
                at, count = self._form.grid(box.hf_start, box.size)
                scale = region(self._scales[self._form.scale_name(box.hf_name)], at, count)
                part = region(shard, box.start, box.size)
                region(quantised, box.start, box.size).copy_(_divided(part, box.hf_start, scale, self._form))
            self._done[name] = quantised
        return self._done[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._shards
        yield from self._scales

    def __len__(self) -> int:
        return len(self._shards) + len(self._scales)


def _blocks(part: Tensor, start: Sequence[int], form: Fp8Form) -> Tensor:
    """A box of a matrix that begins at ``start`` as [block rows, rows, block columns, columns], filled up with zeros.

    A view where the box consists of whole blocks.
    """
    pads: list[int] = []
    sizes: list[int] = []
    for at, length, step in zip(start, part.shape, form.block, strict=True):
        before, step = (0, length) if step is None else (at % step, step)
        pads = [before, -(before + length) % step, *pads]  # F.pad counts from the last dimension
        sizes.append(step)
    if any(pads):
        part = F.pad(part, pads)
    return part.unflatten(1, (-1, sizes[1])).unflatten(0, (-1, sizes[0]))


def _largest(part: Tensor, start: Sequence[int], form: Fp8Form) -> Tensor:
    """Largest |element| of every block that the box touches, float32; infinity for NaN."""
    largest = [blocks.abs().amax(3).amax(1) for blocks in _chunks(_blocks(part, start, form))]
    return torch.cat(largest).float().nan_to_num(nan=torch.inf, posinf=torch.inf)


def _scale_of(largest: Tensor, form: Fp8Form) -> Tensor:
    scale = (largest / E4M3_MAX).clamp_min(_SMALLEST_SCALE)
    if not form.power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(scale.isfinite(), rounded, scale)


def _divided(part: Tensor, start: Sequence[int], scale: Tensor, form: Fp8Form) -> Tensor:
    """The box in e4m3; ``scale`` has those of the blocks that it touches."""
    blocks = _blocks(part, start, form)
    quantised = torch.empty(blocks.shape, dtype=torch.float8_e4m3fn, device=part.device)
    scales = scale[:, None, :, None]
    for target, values, divisors in zip(_chunks(quantised), _chunks(blocks), _chunks(scales, like=blocks), strict=True):
        target.copy_(values.float() / divisors)
    top, left = (0 if step is None else at % step for at, step in zip(start, form.block, strict=True))
    whole = quantised.view(blocks.shape[0] * blocks.shape[1], blocks.shape[2] * blocks.shape[3])
    return whole[top : top + part.shape[0], left : left + part.shape[1]]


def _chunks(blocks: Tensor, *, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Rows of blocks, few enough to stay in the cache of a CPU, or to need little memory beside them on a GPU."""
    sized = blocks if like is None else like
    room = _CHUNK_CPU if blocks.device.type == "cpu" else _CHUNK_GPU
    return blocks.split(max(room // sized[0].numel(), 1))
