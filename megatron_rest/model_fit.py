"""Whether a model can be cut and used as the configuration wants: arithmetic that needs its ``config.json`` alone.

Ranks ask it before they build anything, the planner before it counts, and the launcher before it submits a job.
"""

from __future__ import annotations

from megatron_rest.config import ConfigError, Fp8Recipe, RestConfig
from megatron_rest.fp8_support import REQUIREMENTS
from megatron_rest.model_map import ModelShape, ParameterKind, parameter_map, shard_shape

__all__ = ["check_model"]


def check_model(shape: ModelShape, config: RestConfig) -> None:
    """Raise :class:`ConfigError`, which names the key to change, where the trainer or an engine could not start."""
    _check_length(shape, config)
    _check_stages(shape, config)
    _check_experts(shape, config)
    _check_shards(shape, config)
    _check_engine(shape, config)


def _check_length(shape: ModelShape, config: RestConfig) -> None:
    longest, positions = config.model.max_sequence_length, shape.max_position_embeddings
    if positions and longest > positions:
        raise ConfigError(
            f"model.max_sequence_length {longest} exceeds what {config.model.path} was made for ({positions} positions)"
        )


def _check_stages(shape: ModelShape, config: RestConfig) -> None:
    p, fp8 = config.parallel, config.precision
    if shape.num_layers % (p.pipeline_parallel * p.virtual_pipeline):
        raise ConfigError(
            f"{shape.num_layers} layers do not divide into parallel.pipeline_parallel {p.pipeline_parallel} x "
            f"parallel.virtual_pipeline {p.virtual_pipeline} chunks of equal size"
        )
    if fp8.bf16_layers_start + fp8.bf16_layers_end > shape.num_layers:
        raise ConfigError(
            f"precision.bf16_layers_start {fp8.bf16_layers_start} and bf16_layers_end {fp8.bf16_layers_end} are more "
            f"than the {shape.num_layers} layers of {config.model.path}"
        )


def _check_experts(shape: ModelShape, config: RestConfig) -> None:
    p = config.parallel
    if not shape.num_experts:
        if p.expert_parallel > 1:
            raise ConfigError(
                f"parallel.expert_parallel is {p.expert_parallel}, but {config.model.path} has no experts: set it to 1"
            )
        return
    if shape.num_experts % p.expert_parallel:
        raise ConfigError(
            f"parallel.expert_parallel {p.expert_parallel} does not divide the {shape.num_experts} experts of "
            f"{config.model.path}"
        )
    if p.tensor_parallel > 1 and not p.sequence_parallel:
        raise ConfigError(
            "parallel.sequence_parallel must be true for a mixture of experts with parallel.tensor_parallel > 1: "
            "without it every TP rank would send the same tokens to the experts"
        )


def _check_shards(shape: ModelShape, config: RestConfig) -> None:
    """Every weight can be cut between TP ranks, and the FP8 recipe can multiply what each of them holds."""
    recipe, tp = config.precision.recipe, config.parallel.tensor_parallel
    block = 1 if recipe is Fp8Recipe.NONE else REQUIREMENTS[recipe].block
    for spec in parameter_map(shape):
        if spec.expert:
            continue  # as expert 0
        try:
            rows_and_columns = shard_shape(spec, shape, tp)
        except ValueError as error:
            raise ConfigError(f"parallel.tensor_parallel={tp}: {error}") from error
        is_bf16 = spec.kind is ParameterKind.VOCAB or ".router." in spec.megatron_name
        is_product = len(rows_and_columns) == 2 and not is_bf16
        if is_product and any(size % block for size in rows_and_columns):
            raise ConfigError(
                f"precision.recipe={recipe} multiplies blocks of {block}, and {spec.megatron_name} is "
                f"{list(rows_and_columns)} a rank at parallel.tensor_parallel={tp}: choose another recipe or a smaller "
                "tensor_parallel"
            )


def _check_engine(shape: ModelShape, config: RestConfig) -> None:
    """vLLM cuts query heads and MLPs evenly; key/value heads it copies where there are fewer than workers."""
    tp = config.rollout.tensor_parallel
    has_mlp = not shape.num_experts or shape.dense_layers
    for what, size in (
        ("query heads", shape.num_attention_heads),
        ("rows of the MLP", shape.ffn_hidden_size if has_mlp else 0),
    ):
        if size % tp:
            raise ConfigError(f"rollout.tensor_parallel {tp} does not divide the {size} {what} of {config.model.path}")
    fewer, more = sorted((tp, shape.num_query_groups))
    if more % fewer:
        raise ConfigError(
            f"rollout.tensor_parallel {tp} and the {shape.num_query_groups} key/value heads of {config.model.path}: "
            "one has to divide the other"
        )
