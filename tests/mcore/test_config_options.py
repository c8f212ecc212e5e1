"""Options of config.json: mapped, so that logits are those of transformers, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rest.model_map import ModelShape
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import random_samples
from tests.helpers.tiny_model import VOCAB_SIZE, build_tiny_model, read_config
from tests.mcore.test_models import LOGIT_TOLERANCE, through_megatron

MAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "large epsilon": ("llama", {"rms_norm_eps": 1e-2}),
    "another base of rotation": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "a sliding window that is off": ("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
    "every layer listed": ("qwen3", {"layer_types": ["full_attention"] * 2}),
    "heads that share nothing": ("llama", {"num_key_value_heads": 4}),
    "heads as wide as the model": ("qwen2", {"head_dim": 16}),
    "another name of silu": ("llama", {"hidden_act": "swish"}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "one expert a token": ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "experts in every second layer": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "all experts, unnormalised": ("qwen3_moe", {"num_experts_per_tok": 4, "norm_topk_prob": False}),
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' .* only 'silu' and 'swish'"),
    ("qwen3", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
    ("mistral", {"sliding_window": 4096}, "sliding_window=4096"),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
    ("llama", {"bias": True}, "bias=True"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm=True"),
    ("qwen3", {"use_qk_norm": False}, "use_qk_norm=False"),
    ("llama", {"qkv_bias": True}, "qkv_bias=True"),
    ("qwen3", {"is_causal": False}, "is_causal=False"),
    ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "only Qwen2ForCausalLM is a policy"),
    ("llama", {"architectures": ["LlamaForCausalLMEagle3"]}, "only LlamaForCausalLM is a policy"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "not those that Megatron computes with"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type 'yarn'"),
    ("qwen2", {"rope_scaling": {"type": "default", "mrope_section": [4, 6, 6]}}, "mrope_section"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
    ("llama", {"residual_multiplier": 0.22}, "residual_multiplier"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1"),
    ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 of 4"),
    ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts"),
    ("llama", {"compression_config": {"quant_method": "compressed-tensors"}}, "quantised"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("options")
    tied = {"tied": False}
    return {
        name: build_tiny_model(folder / name.replace(" ", "-"), arch=arch, with_tokenizer=False, **{**tied, **options})
        for name, (arch, options) in MAPPED.items()
    }


@pytest.fixture(scope="module")
def logits(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    [found] = run_distributed(through_megatron, 1, [str(path) for path in folders.values()])
    return dict(zip(folders, found, strict=True))


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_options_give_the_logits_of_transformers(name: str, folders: Any, logits: Any) -> None:
    from transformers import AutoModelForCausalLM

    arch, _ = MAPPED[name]
    options = {"experts_implementation": "eager"} if arch == "qwen3_moe" else {}
    reference = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64, **options)
    start = 0
    for sample in random_samples(VOCAB_SIZE, count=3):
        ids = torch.from_numpy(sample.token_ids[:-1].astype("int64"))
        with torch.no_grad():
            expected = reference(ids[None]).logits[0]
        got = logits[name][start : start + len(ids), :VOCAB_SIZE].double()
        torch.testing.assert_close(got, expected, atol=LOGIT_TOLERANCE, rtol=1e-5)
        start += len(ids)


@pytest.mark.parametrize(
    ("arch", "options", "words"), REFUSED, ids=[f"{a}-{next(iter(o))}-{i}" for i, (a, o, _) in enumerate(REFUSED)]
)
def test_unmapped_options_are_refused_by_name(arch: str, options: dict[str, Any], words: str, folders: Any) -> None:
    name = next(name for name, (of, _) in MAPPED.items() if of == arch)
    config = read_config(folders[name])
    if "rope_scaling" in options:
        config.pop("rope_parameters")
    with pytest.raises(ValueError, match=words):
        ModelShape.from_hf_config({**config, **options})


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_what_is_not_said_is_the_default_of_transformers(arch: str) -> None:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 32}
    theirs = transformers.AutoConfig.for_model(arch, **sizes, vocab_size=99)
    window = {"sliding_window": None} if arch == "mistral" else {}
    ours = ModelShape.from_hf_config({"model_type": arch, **sizes, "vocab_size": 99, **window})
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_query_groups, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (ours.norm_eps, ours.tied_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    if arch == "qwen3_moe":
        assert (ours.num_experts, ours.num_experts_per_token) == (theirs.num_experts, theirs.num_experts_per_tok)
        assert ours.moe_ffn_hidden_size == theirs.moe_intermediate_size
        assert ours.has_normalized_expert_probs == theirs.norm_topk_prob
