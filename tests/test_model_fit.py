"""What a model cannot be cut into is refused by the key to change, before a rank or an engine is started."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rest.config import ConfigError, load
from megatron_rest.model_fit import check_model
from megatron_rest.model_map import ModelShape

DENSE = {
    "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 1000,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 4096,
}  # fmt: skip
MOE = {
    **DENSE, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": 765,
}  # fmt: skip
WIDE = "model.dtype=bfloat16"


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        (DENSE, "model.max_sequence_length=4097", "exceeds what /m was made for (4096 positions)"),
        (DENSE, "parallel.pipeline_parallel=4", "6 layers do not divide into parallel.pipeline_parallel 4"),
        (DENSE, "parallel.pipeline_parallel=2 parallel.virtual_pipeline=2", "parallel.virtual_pipeline 2 chunks"),
        (DENSE, "parallel.expert_parallel=2", "has no experts: set it to 1"),
        (MOE, "parallel.expert_parallel=3", "does not divide the 8 experts of /m"),
        (MOE, "parallel.tensor_parallel=2", "parallel.sequence_parallel must be true for a mixture of experts"),
        (DENSE, "parallel.tensor_parallel=8", "parallel.tensor_parallel=8: tensor_parallel 8 does not divide 4 key"),
        (DENSE, "parallel.tensor_parallel=3", "does not divide 4 key/value heads"),
        (DENSE | {"intermediate_size": 770}, "parallel.tensor_parallel=4", "is not divisible by TP 4"),
        (DENSE, "precision.recipe=mxfp8 precision.bf16_layers_end=7", "bf16_layers_end 7 are more than the 6 layers"),
        (
            DENSE, "precision.recipe=blockwise parallel.tensor_parallel=4",
            "blocks of 128, and decoder.layers.0.self_attention.linear_proj.weight is [256, 64]",
        ),
        (
            DENSE | {"intermediate_size": 760}, "precision.recipe=tensorwise",
            "tensorwise multiplies blocks of 16, and decoder.layers.0.mlp.linear_fc2.weight is [256, 760]",
        ),
        (DENSE, "rollout.tensor_parallel=3", "rollout.tensor_parallel 3 does not divide the 8 query heads of /m"),
        (DENSE | {"intermediate_size": 770}, "rollout.tensor_parallel=4", "does not divide the 770 rows of the MLP"),
        (
            DENSE | {"num_attention_heads": 24, "num_key_value_heads": 4}, "rollout.tensor_parallel=6",
            "rollout.tensor_parallel 6 and the 4 key/value heads of /m: one has to divide the other",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_its_key(model: dict[str, Any], overrides: str, message: str) -> None:
    config = load(overrides=["model.path=/m", WIDE, *overrides.split()])
    with pytest.raises(ConfigError) as refusal:
        check_model(ModelShape.from_hf_config(model), config)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        (DENSE, "parallel.pipeline_parallel=3 parallel.virtual_pipeline=2 model.max_sequence_length=4096"),
        (DENSE, "precision.recipe=blockwise"),
        (DENSE | {"intermediate_size": 760}, ""),  # without FP8 no blocks
        (DENSE, "precision.recipe=mxfp8 parallel.tensor_parallel=4 precision.bf16_layers_start=5"),
        (DENSE, "rollout.tensor_parallel=8"),  # key/value heads are held twice
        (MOE, "parallel.expert_parallel=4 parallel.tensor_parallel=2 parallel.sequence_parallel=true"),
        (MOE, "rollout.tensor_parallel=2"),  # no layer has the MLP whose rows would not divide
    ],
)
def test_what_can_be_cut_passes(model: dict[str, Any], overrides: str) -> None:
    check_model(ModelShape.from_hf_config(model), load(overrides=["model.path=/m", WIDE, *overrides.split()]))
