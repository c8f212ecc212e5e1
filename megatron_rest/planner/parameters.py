"""Parameters of every pipeline stage, counted from the table that the loader, the exporter and the transfer read."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rest.config import ParallelConfig
from megatron_rest.model_map import ModelShape, ParameterSpec, hf_shapes, parameter_map, shard_shape

__all__ = ["StageParameters", "count_stages", "layers_of_chunk", "total_parameters"]

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageParameters:
    """Numbers held by one rank of a stage."""

    dense: int = 0  # replicated over DP x CP
    experts: int = 0  # replicated over DP x CP x TP / EP
    largest: int = 0  # of one parameter: its gradient exists once more before it is added to the buffer
    layer_matrices: int = 0  # what FP8 multiplies

    @property
    def total(self) -> int:
        return self.dense + self.experts


@functools.lru_cache(maxsize=64)
def count_stages(shape: ModelShape, parallel: ParallelConfig) -> tuple[StageParameters, ...]:
    """One entry a pipeline stage, of a model that can be cut like that (``model_fit.check_model``)."""
    pp, tp, ep = parallel.pipeline_parallel, parallel.tensor_parallel, parallel.expert_parallel
    dense, experts, largest, matrices = ([0] * pp for _ in range(4))
    for spec in parameter_map(shape):
        dims = shard_shape(spec, shape, tp)
        size = math.prod(dims)
        for stage in _stages(spec, shape, parallel):
            if spec.expert is not None:
                experts[stage] += size
            else:
                dense[stage] += size
            largest[stage] = max(largest[stage], size)
            if len(dims) > 1 and _LAYER.match(spec.megatron_name):
                matrices[stage] += size // (1 if spec.expert is None else ep)
    return tuple(
        StageParameters(dense=d, experts=e // ep, largest=big, layer_matrices=m)
        for d, e, big, m in zip(dense, experts, largest, matrices, strict=True)
    )


def layers_of_chunk(shape: ModelShape, parallel: ParallelConfig) -> int:
    """Layers of one model chunk of one stage."""
    return shape.num_layers // (parallel.pipeline_parallel * parallel.virtual_pipeline)


@functools.lru_cache(maxsize=64)
def total_parameters(shape: ModelShape, *, active_only: bool = False, matrices_only: bool = False) -> int:
    """Of the whole model, padding left out.

    ``active_only`` counts the experts that one token visits, ``matrices_only`` leaves out norms and biases.
    """
    total = 0
    share = shape.num_experts_per_token / shape.num_experts if active_only and shape.num_experts else 1.0
    experts = 0
    for spec in parameter_map(shape):
        size = sum(math.prod(dims) for dims in hf_shapes(spec, shape) if len(dims) > 1 or not matrices_only)
        if spec.expert is not None:
            experts += size
        else:
            total += size
    return total + round(experts * share)


def _stages(spec: ParameterSpec, shape: ModelShape, parallel: ParallelConfig) -> Iterator[int]:
    pp = parallel.pipeline_parallel
    layer = _LAYER.match(spec.megatron_name)
    if layer:  # chunk c of stage r holds layers (c * PP + r) * k ...
        yield int(layer[1]) // layers_of_chunk(shape, parallel) % pp
    elif spec.megatron_name.startswith("embedding."):
        yield 0
        if spec.tied_copies and pp > 1:  # the output layer's copy
            yield pp - 1
    else:
        yield pp - 1
