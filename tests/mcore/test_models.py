"""Every supported architecture from a Hugging Face folder into Megatron and back, on TP 1 and 2.

Tiny random models built by transformers: Qwen2 (QKV bias), Qwen3 (QK norm), Llama 3 with and without its rotary
scaling, Qwen3-MoE with a dense layer and both ways to normalise the router; tied and untied; a vocabulary that TP pads.
Logits against transformers in float64 (packed sequences against one at a time), tensors of the way back bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.distributed import run_distributed
from tests.helpers.policies import layout_config, make_policy, random_samples
from tests.helpers.tiny_model import VOCAB_SIZE, build_tiny_model, read_config

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MOE = {"arch": "qwen3_moe", "mlp_only_layers": [1], "layers": 3}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-tied": {"arch": "qwen2", "tied": True},
    "qwen2-untied": {"arch": "qwen2", "tied": False},
    "qwen3-tied": {"arch": "qwen3", "tied": True},
    "qwen3-untied": {"arch": "qwen3", "tied": False},
    "llama-tied": {"arch": "llama", "tied": True},
    "llama3-rope": {"arch": "llama", "tied": False, "rope_parameters": LLAMA3_ROPE},
    "qwen3_moe": {**MOE, "tied": False},
    "qwen3_moe-unnormalised": {**MOE, "tied": True, "norm_topk_prob": False},
}
LOGIT_TOLERANCE = 2e-5  # float32 against float64, logits of size 1 to 10


def through_megatron(rank: int, world_size: int, folders: list[str]) -> list[torch.Tensor]:
    """Vocabulary-parallel logits ``[T, V/TP]`` of each model's packed samples; exports go beside the models."""
    from megatron.core import parallel_state

    from megatron_rest.data.batching import make_microbatch
    from megatron_rest.mcore.forward_step import packed_seq_params
    from megatron_rest.mcore.output import detach
    from megatron_rest.trainer.export import export_hf
    from megatron_rest.trainer.setup import weight_source

    logits = []
    for folder in folders:
        parts = make_policy(layout_config(folder, tp=world_size, sp=world_size > 1))
        [chunk] = parts.policy.modules
        detach(chunk)
        microbatch = make_microbatch(random_samples(VOCAB_SIZE, count=3), alignment=parts.alignment)
        with torch.no_grad():
            out = chunk(
                microbatch.token_ids[None],
                microbatch.position_ids[None],
                None,
                packed_seq_params=packed_seq_params(microbatch),
            )
        logits.append(out[0].clone())
        source = weight_source(parts, bucket_bytes=1 << 16)
        export_hf(iter(source), base=folder, output=Path(f"{folder}-tp{world_size}"))
        assert not source.faults and not source.drifted
        parallel_state.destroy_model_parallel()
    return logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: build_tiny_model(
            root / name, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256, **options
        )
        for name, options in MODELS.items()
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def results(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[int, dict[str, torch.Tensor]]:
    """(TP, full logits of each model)"""
    by_rank = run_distributed(through_megatron, request.param, [str(folder) for folder in folders.values()])
    whole = [torch.cat(shards, dim=-1) for shards in zip(*by_rank, strict=True)]
    return request.param, dict(zip(folders, whole, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, folders: dict[str, Path], results: Any) -> None:
    from transformers import AutoModelForCausalLM

    tp, logits = results
    assert logits[name].shape[-1] == -(-VOCAB_SIZE // tp) * tp  # the vocabulary is odd: TP 2 pads it
    # The default for experts, one grouped product, knows no float64.
    options = {"experts_implementation": "eager"} if "moe" in name else {}
    reference = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64, **options)
    start = 0
    for sample in random_samples(VOCAB_SIZE, count=3):
        ids = torch.from_numpy(sample.token_ids[:-1].astype("int64"))
        with torch.no_grad():
            expected = reference(ids[None]).logits[0]
        got = logits[name][start : start + len(ids), :VOCAB_SIZE].double()
        assert expected.abs().max() > 1
        torch.testing.assert_close(got, expected, atol=LOGIT_TOLERANCE, rtol=0)
        start += len(ids)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_comes_back_bit_for_bit(name: str, folders: dict[str, Path], results: Any) -> None:
    tp, _ = results
    output = folders[name].with_name(f"{name}-tp{tp}")
    original, exported = (
        {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
        for folder in (folders[name], output)
    )
    assert exported.keys() == original.keys()
    for key, value in original.items():
        assert exported[key].dtype == value.dtype
        assert torch.equal(exported[key], value), key
    assert ("lm_head.weight" in exported) == (not MODELS[name]["tied"])
    assert read_config(output) == read_config(folders[name])
