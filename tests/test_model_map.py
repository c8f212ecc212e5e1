"""The parameter table: exact round trips at every TP size, layouts written out by hand, agreement with transformers."""

from __future__ import annotations

import pytest
import torch

from megatron_rest.model_map import (
    ModelShape,
    ParameterKind,
    expert_owner,
    hf_shapes,
    padded_vocab_size,
    parameter_map,
    resolve_name,
    shard_shape,
    to_hf,
    to_megatron,
)

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
CONFIGS = {
    "qwen3-tied": {**BASE, "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3-untied": {**BASE, "model_type": "qwen3", "tie_word_embeddings": False},
    "qwen2": {**BASE, "model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 4},
    "llama": {**BASE, "model_type": "llama", "tie_word_embeddings": False},
    "mistral": {**BASE, "model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None},
    "qwen3_moe": {**BASE, **MOE, "model_type": "qwen3_moe", "tie_word_embeddings": False, "mlp_only_layers": [0]},
}


def random_state(shape: ModelShape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(size, generator=generator)
        for spec in parameter_map(shape)
        for name, size in zip(spec.hf_names, hf_shapes(spec, shape), strict=True)
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 64])
def test_round_trip_is_exact(name: str, tp_size: int, multiple: int) -> None:
    shape = ModelShape.from_hf_config(CONFIGS[name], vocab_multiple=multiple)
    state = random_state(shape)
    back: dict[str, torch.Tensor] = {}
    for spec in parameter_map(shape):
        shards = [to_megatron(spec, state, tp_rank=r, tp_size=tp_size, shape=shape) for r in range(tp_size)]
        assert {tuple(s.shape) for s in shards} == {shard_shape(spec, shape, tp_size)}
        back |= to_hf(spec, shards, shape=shape)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    shape = ModelShape.from_hf_config(CONFIGS[name])
    ours = {key: tuple(value.shape) for key, value in random_state(shape).items()}
    if shape.num_experts:  # transformers 5 holds experts fused in memory; checkpoints have one tensor an expert
        expected = {k: v for k, v in expected.items() if ".mlp.experts." not in k}
        ours = {k: v for k, v in ours.items() if ".mlp.experts." not in k}
    assert ours == expected
    # ... and what transformers writes to config.json reads back to the same numbers
    assert ModelShape.from_hf_config(config.to_dict()) == shape


def test_qkv_layout_by_hand() -> None:
    """Two groups of two query heads, head_dim 1: Megatron's rows are q0 q1 k0 v0 | q2 q3 k1 v1."""
    config = {**CONFIGS["llama"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 1, "hidden_size": 1}
    shape = ModelShape.from_hf_config(config)
    spec = next(s for s in parameter_map(shape) if s.kind is ParameterKind.QKV)
    state = dict(zip(spec.hf_names, ([[0.0], [1], [2], [3]], [[10.0], [11]], [[20.0], [21]]), strict=True))
    hf = {key: torch.tensor(value) for key, value in state.items()}
    halves = [to_megatron(spec, hf, tp_rank=r, tp_size=2, shape=shape).flatten().tolist() for r in (0, 1)]
    assert halves == [[0, 1, 10, 20], [2, 3, 11, 21]]


def test_gate_up_layout_by_hand() -> None:
    shape = ModelShape.from_hf_config({**CONFIGS["llama"], "intermediate_size": 4, "hidden_size": 1})
    spec = next(s for s in parameter_map(shape) if s.kind is ParameterKind.GATE_UP)
    hf = {spec.hf_names[0]: torch.arange(4.0).view(4, 1), spec.hf_names[1]: torch.arange(10.0, 14).view(4, 1)}
    halves = [to_megatron(spec, hf, tp_rank=r, tp_size=2, shape=shape).flatten().tolist() for r in (0, 1)]
    assert halves == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_experts_are_whole_and_dealt_out_in_order() -> None:
    shape = ModelShape.from_hf_config(CONFIGS["qwen3_moe"])
    experts = [s for s in parameter_map(shape) if s.expert is not None]
    assert [s.expert for s in experts] == [0, 0, 1, 1, 2, 2, 3, 3], "gate_up and down of each, in layer 1 alone"
    for spec in experts:
        assert shard_shape(spec, shape, 4) == shard_shape(spec, shape, 1), "TP does not cut an expert"
    assert [expert_owner(e, 4, 2) for e in range(4)] == [0, 0, 1, 1]
    assert [expert_owner(e, 4, 4) for e in range(4)] == [0, 1, 2, 3]


def test_padded_vocabulary_holds_zeros_and_is_cut_off() -> None:
    assert padded_vocab_size(101, 2, 64) == 128
    assert padded_vocab_size(128, 2, 64) == 128
    assert padded_vocab_size(129, 4, 64) == 256
    shape = ModelShape.from_hf_config(CONFIGS["qwen3-tied"], vocab_multiple=64)
    spec = parameter_map(shape)[0]
    hf = {spec.hf_names[0]: torch.ones(101, 32)}
    last = to_megatron(spec, hf, tp_rank=1, tp_size=2, shape=shape)
    assert last.shape == (64, 32)
    assert last[:37].eq(1).all() and last[37:].eq(0).all()
    # At TP 4 the whole last shard of 256 rows is padding.
    assert to_megatron(spec, hf, tp_rank=3, tp_size=4, shape=shape).eq(0).all()


def test_order_is_layer_order_and_tied_head_is_not_sent() -> None:
    shape = ModelShape.from_hf_config(CONFIGS["qwen3-tied"])
    specs = parameter_map(shape)
    assert specs[0].megatron_name == "embedding.word_embeddings.weight"
    assert specs[0].tied_copies == ("output_layer.weight",)
    assert specs[-1].megatron_name == "decoder.final_layernorm.weight"
    layers = [int(s.megatron_name.split(".")[2]) for s in specs[1:-1]]
    assert layers == sorted(layers)
    assert resolve_name(specs[0], {"output_layer.weight": 0}) is None


def test_transformer_engine_names_resolve() -> None:
    shape = ModelShape.from_hf_config(CONFIGS["qwen3-tied"])
    by_name = {s.megatron_name: s for s in parameter_map(shape)}
    fused = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert resolve_name(by_name["decoder.layers.1.input_layernorm.weight"], {fused: 0}) == fused
    fused = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    assert resolve_name(by_name["decoder.layers.1.pre_mlp_layernorm.weight"], {fused: 0}) == fused


def test_what_cannot_be_mapped_is_refused() -> None:
    with pytest.raises(ValueError, match="no mapping to Megatron; known: qwen3"):
        ModelShape.from_hf_config({**BASE, "model_type": "gpt2"})
    with pytest.raises(ValueError, match="use_sliding_window"):
        ModelShape.from_hf_config({**CONFIGS["qwen2"], "use_sliding_window": True})
    block_scales = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ValueError, match=r"quant_method fp8.* start from the unquantised checkpoint"):
        ModelShape.from_hf_config({**CONFIGS["qwen2"], "quantization_config": block_scales})
    shape = ModelShape.from_hf_config(CONFIGS["llama"])
    qkv = next(s for s in parameter_map(shape) if s.kind is ParameterKind.QKV)
    with pytest.raises(ValueError, match="does not divide 4 key/value heads"):
        shard_shape(qkv, shape, 8)
    state = random_state(shape)
    state["model.norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\), config.json says \(32,\)"):
        to_megatron(parameter_map(shape)[-2], state, tp_rank=0, tp_size=1, shape=shape)
    with pytest.raises(KeyError, match=r"no tensor 'lm_head.weight'"):
        to_megatron(parameter_map(shape)[-1], {}, tp_rank=0, tp_size=1, shape=shape)


def test_rotary_parameters_of_both_transformers_generations() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    new = {k: v for k, v in CONFIGS["llama"].items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "llama3", **scaling, "rope_theta": 5e5}
    for kind in ("rope_type", "type"):
        old = {**CONFIGS["llama"], "rope_theta": 5e5, "rope_scaling": {kind: "llama3", **scaling}}
        assert ModelShape.from_hf_config(old) == ModelShape.from_hf_config(new)
    for wrong in ({"high_freq_factor": 8.0}, {"original_max_position_embeddings": 4096}):
        with pytest.raises(ValueError, match="not those that Megatron computes with"):
            ModelShape.from_hf_config({**new, "rope_parameters": {**new["rope_parameters"], **wrong}})
    assert ModelShape.from_hf_config(CONFIGS["llama"]).rope_scaling == {}


def test_two_spellings_that_differ_are_refused() -> None:
    """A model card's rope_scaling, added to a file of transformers 5: readers follow the one or the other."""
    plain = {**CONFIGS["llama"], "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    plain.pop("rope_theta", None)
    both = {**plain, "rope_theta": 5e5, "rope_scaling": {"type": "default"}}
    assert ModelShape.from_hf_config(both).rope_theta == 5e5
    for name, more, words in (
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_parameters and rope_scaling"),
        ("llama", {"rope_theta": 1e4}, "rope_theta and that of the rotary parameters"),
        ("llama", {"rope_scaling": {"type": "default", "rope_theta": 1e4}}, "rope_theta and that"),
        ("moe", {"num_experts": 8, "num_local_experts": 4}, "num_experts and num_local_experts"),
    ):
        config = {**CONFIGS["qwen3_moe"], **more} if name == "moe" else {**plain, **more}
        with pytest.raises(ValueError, match=f"{words}.* differ: keep the one that is meant"):
            ModelShape.from_hf_config(config)
