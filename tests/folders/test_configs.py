"""Published ``config.json`` files of real size: shapes whose parameters are as many as published, or a reason.

The files are written out with every key that they have, since it is the odd ones that a reader stumbles over.  Numbers
and keys are facts of the files on the hub; the counts are those of their safetensors, tied heads counted once.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_rest.model_map import ModelShape, hf_shapes, parameter_map, shard_shape

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "use_cache": True, "transformers_version": "4.51.0",
}  # fmt: skip
_QWEN: dict[str, Any] = {
    **_COMMON, "bos_token_id": 151643, "eos_token_id": 151645, "rms_norm_eps": 1e-6, "use_sliding_window": False,
}  # fmt: skip
_QWEN2: dict[str, Any] = {
    **_QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "sliding_window": 131072, "max_window_layers": 70, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    **_QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "max_position_embeddings": 40960, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "vocab_size": 151936, "num_key_value_heads": 8,
}  # fmt: skip
_CODER: dict[str, Any] = {
    **_QWEN, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
    "head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [], "norm_topk_prob": True,
    "num_experts_per_tok": 8, "output_router_logits": False, "qkv_bias": False, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0, "sliding_window": None,
    "tie_word_embeddings": False, "use_qk_norm": True, "vocab_size": 151936,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    **_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "pretraining_tp": 1, "rms_norm_eps": 1e-5,
}  # fmt: skip
_LLAMA3: dict[str, Any] = {
    **_LLAMA, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072,
    "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256, "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
_LLAMA_8B: dict[str, Any] = {
    **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
}  # fmt: skip
_MISTRAL: dict[str, Any] = {
    **_COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN25_7B: dict[str, Any] = {
    **_QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_window_layers": 28,
}  # fmt: skip

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Qwen2.5-0.5B": (494_032_768, {
        **_QWEN2, "eos_token_id": 151643, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "sliding_window": 32768, "max_window_layers": 24, "use_mrope": False,
    }),
    "Qwen2.5-3B-Instruct": (3_085_938_688, {
        **_QWEN2, "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "sliding_window": 32768,
    }),
    "Qwen2.5-7B-Instruct": (7_615_616_512, _QWEN25_7B),
    "Qwen2.5-72B-Instruct": (72_706_203_648, {
        **_QWEN2, "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_hidden_layers": 80,
        "num_key_value_heads": 8, "vocab_size": 152064,
    }),
    "Qwen3-0.6B": (596_049_920, {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28,
        "max_window_layers": 28, "tie_word_embeddings": True,
    }),
    "Qwen3-8B": (8_190_735_360, {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36,
        "max_window_layers": 36, "tie_word_embeddings": False,
    }),
    "Qwen3-4B-Thinking-2507": (4_022_468_096, {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36,
        "max_window_layers": 36, "tie_word_embeddings": True, "max_position_embeddings": 262144, "rope_theta": 5000000,
    }),
    "Qwen3-Coder-30B-A3B-Instruct": (30_532_122_624, {
        **_CODER, "hidden_size": 2048, "intermediate_size": 5472, "max_window_layers": 28, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_experts": 128, "num_hidden_layers": 48, "num_key_value_heads": 4,
    }),
    "Qwen3-Coder-480B-A35B-Instruct": (480_154_875_392, {
        **_CODER, "hidden_size": 6144, "intermediate_size": 8192, "max_window_layers": 62, "num_attention_heads": 96,
        "moe_intermediate_size": 2560, "num_experts": 160, "num_hidden_layers": 62, "num_key_value_heads": 8,
    }),
    "Llama-3.1-8B-Instruct": (8_030_261_248, _LLAMA_8B),
    "Llama-3.2-1B-Instruct": (1_235_814_400, {
        **_LLAMA3, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_hidden_layers": 16, "tie_word_embeddings": True,
        "rope_scaling": {**_LLAMA3["rope_scaling"], "factor": 32.0},
    }),
    "Llama-3.3-70B-Instruct": (70_553_706_496, {
        **_LLAMA3, "head_dim": 128, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_hidden_layers": 80,
    }),
    "SmolLM2-135M-Instruct": (134_515_008, {
        **_LLAMA, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 576, "vocab_size": 49152,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    }),
    "DeepSeek-R1-Distill-Qwen-1.5B": (1_777_088_000, {
        **_QWEN2, "eos_token_id": 151643, "hidden_size": 1536, "intermediate_size": 8960, "max_window_layers": 21,
        "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "vocab_size": 151936,
        "rope_theta": 10000, "sliding_window": 4096, "max_position_embeddings": 131072, "use_mrope": False,
    }),
    "DeepSeek-R1-Distill-Llama-8B": (8_030_261_248, {**_LLAMA_8B, "eos_token_id": 128001}),
    "Hermes-3-Llama-3.1-8B": (8_030_261_248, {**_LLAMA_8B, "eos_token_id": 128040, "use_cache": False}),
    "Mistral-7B-Instruct-v0.3": (7_248_023_552, {
        **_MISTRAL, "hidden_size": 4096, "max_position_embeddings": 32768, "num_hidden_layers": 32, "vocab_size": 32768,
    }),
    "Mistral-Nemo-Instruct-2407": (12_247_782_400, {
        **_MISTRAL, "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 1024000, "num_hidden_layers": 40,
        "vocab_size": 131072,
    }),
}  # fmt: skip

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-7B-Instruct-1M": ("dual_chunk_attention_config", {
        **_QWEN25_7B, "max_position_embeddings": 1010000, "rope_theta": 10000000.0, "sliding_window": 32768,
        "dual_chunk_attention_config": {
            "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144
        },
    }),
    "Qwen2.5-7B-Instruct with YaRN, as its model card says": ("type 'yarn'", {
        **_QWEN25_7B, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    }),
    "Qwen2.5-Math-PRM-7B": ("Qwen2ForProcessRewardModel: only Qwen2ForCausalLM", {
        **_QWEN25_7B, "architectures": ["Qwen2ForProcessRewardModel"],
    }),
    "Mistral-7B-Instruct-v0.1": ("sliding_window=4096", {
        **_MISTRAL, "hidden_size": 4096, "max_position_embeddings": 32768, "num_hidden_layers": 32, "vocab_size": 32000,
        "rope_theta": 10000.0, "sliding_window": 4096,
    }),
    "SmolLM3-3B": ("model_type 'smollm3'", {
        **_COMMON, "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "hidden_size": 2048,
        "intermediate_size": 11008, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "vocab_size": 128256,
    }),
    "GLM-4.5": ("model_type 'glm4_moe'", {
        **_COMMON, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
        "first_k_dense_replace": 3, "head_dim": 128, "hidden_size": 5120, "n_routed_experts": 160,
        "n_shared_experts": 1, "num_attention_heads": 96, "num_hidden_layers": 92, "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5, "use_qk_norm": True, "vocab_size": 151552,
    }),
    "gpt-oss-20b": ("model_type 'gpt_oss'", {
        **_COMMON, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
        "hidden_size": 2880, "num_attention_heads": 64, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "sliding_window": 128, "vocab_size": 201088,
    }),
    "DeepSeek-V3.1": ("model_type 'deepseek_v3'", {
        **_COMMON, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
        "kv_lora_rank": 512, "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 128,
        "num_hidden_layers": 61, "q_lora_rank": 1536, "scoring_func": "sigmoid", "vocab_size": 129280,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_published_parameters(name: str) -> None:
    count, config = PUBLISHED[name]
    shape = ModelShape.from_hf_config(config)
    specs = parameter_map(shape)
    assert sum(math.prod(size) for spec in specs for size in hf_shapes(spec, shape)) == count
    for spec in specs[:12]:  # one group of key/value heads a rank, which its o_proj and MLP can be cut for as well
        assert shard_shape(spec, shape, shape.num_query_groups)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_mapping_is_refused_in_one_line_that_names_it(name: str) -> None:
    words, config = REFUSED[name]
    with pytest.raises(ValueError, match=words) as refused:
        ModelShape.from_hf_config(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_the_same_numbers(name: str) -> None:
    """What it makes of the file, written again in its own spelling, is the same shape."""
    import transformers

    _, config = PUBLISHED[name]
    theirs = transformers.AutoConfig.for_model(**config)
    assert ModelShape.from_hf_config(theirs.to_dict()) == ModelShape.from_hf_config(config)
