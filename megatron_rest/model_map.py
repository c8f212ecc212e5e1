"""One table between Hugging Face checkpoints and Megatron-Core parameters, as pure data and pure functions.

    HF full tensors --to_megatron--> one TP rank's shard          (loading)
    all TP shards of a parameter --to_hf--> HF full tensors       (export, weight transfer)

Everything that has to know how the two sides name and lay out a weight reads this table: the loader, the exporter and
the transfer into the rollout engine.  It needs torch only, no process group and no Megatron.

Megatron's layouts, all along dimension 0 unless said otherwise:

* QKV: for every key/value group its query heads, then its key head, then its value head; TP cuts between groups.
* GATE_UP (``linear_fc1`` of SwiGLU): every TP shard is its slice of the gate above its slice of the up projection.
* VOCAB: rows padded with zeros up to a multiple of ``vocab_multiple * tp_size``; the padding never reaches HF.
* PLAIN: cut along ``shard_dim`` (0 column parallel, 1 row parallel), or the same on every rank (``None``).

Experts are never cut along TP (Megatron's ``expert_tensor_parallel_size`` is 1): expert ``e`` of ``E`` lies whole on
rank ``e * EP // E`` of every expert-parallel group, and nowhere else in that group.

Covered: Qwen3 (QK norm), Qwen2 / Qwen2.5 (QKV bias), Llama 2 / 3, Mistral without a window and Qwen3-MoE, tied or
untied embeddings.  Layer and expert numbers in the names are global: the caller adds its pipeline and expert offsets.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # names, shapes and counts are read where there is no torch; what moves tensors imports it
    from torch import Tensor

__all__ = [
    "ARCHITECTURES",
    "ModelShape",
    "ParameterKind",
    "ParameterSpec",
    "expert_owner",
    "hf_shapes",
    "padded_vocab_size",
    "parameter_map",
    "resolve_name",
    "shard_shape",
    "to_hf",
    "to_megatron",
]

_LARGEST = 1 << 31
ARCHITECTURES: Mapping[str, str] = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""The supported values of ``model_type``, and the class that transformers and vLLM have for each."""
_WITH_QK_NORM = ("qwen3", "qwen3_moe")

# Options of config.json that change a model's numbers and have no mapping, with the values that change nothing.  null
# and false always change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (),
    "dual_chunk_attention_config": (),  # Qwen2.5-1M's: vLLM follows it, transformers does not
    "mlp_bias": (),
    "attention_bias": (),  # of the output projection, too
    "qkv_bias": (),
    "bias": (),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "scale_depth": (),
    "scale_emb": (1, 1.0),
    "dim_model_base": (),
    "no_rope_layers": ([],),  # SmolLM3's and Llama 4's: layers without rotary embedding
    "no_rope_layer_interval": (0,),
    "use_parallel_residual": (),
    "scoring_func": ("softmax",),
    "n_group": (1,),
    "routed_scaling_factor": (1, 1.0),
    "n_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
}
# What transformers' classes take where config.json says nothing (a null is something else: heads share nothing then).
_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768
    },
}  # fmt: skip

_LLAMA3_CONSTANTS: Mapping[str, Any] = {  # of Llama 3.1 to 3.3, and of Megatron's scaling
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
}  # fmt: skip


class ParameterKind(StrEnum):
    """How one Megatron parameter is composed of HF tensors."""

    PLAIN = "plain"  # one HF tensor, as it is
    QKV = "qkv"  # q, k, v interleaved by key/value group
    GATE_UP = "gate_up"  # gate above up inside every shard
    VOCAB = "vocab"  # one HF tensor, rows padded


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The numbers of a decoder that decide names, shapes and arithmetic; read from an HF ``config.json``."""

    model_type: str  # HF's name of the architecture
    hidden_size: int
    ffn_hidden_size: int  # of the dense MLP
    num_layers: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    vocab_size: int  # true size, without padding
    tied_embeddings: bool  # output layer = transposed input embedding
    has_qkv_bias: bool
    has_qk_norm: bool
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict, hash=False)  # empty = plain rotary embedding
    max_position_embeddings: int = 0  # 0 = not stated
    vocab_multiple: int = 1  # Megatron's make_vocab_size_divisible_by
    num_experts: int = 0  # 0 = dense
    moe_ffn_hidden_size: int = 0
    num_experts_per_token: int = 0
    has_normalized_expert_probs: bool = False  # the chosen experts' router probabilities sum to 1
    dense_layers: tuple[int, ...] = ()  # layers without experts in a MoE model

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot be shared by {self.num_query_groups} key/value heads: "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.vocab_multiple < 1:
            raise ValueError(f"vocab_multiple is {self.vocab_multiple}, expected at least 1")

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], *, vocab_multiple: int = 1) -> ModelShape:
        """Read the content of an HF ``config.json`` (transformers 4 and 5 spellings of the rotary parameters).

        Raises ValueError for an architecture or an option that this table does not map (sliding windows, biases of the
        output projection or the MLP): such a model would load without an error and compute something else.  Also for
        values that no model can have.
        """
        try:
            shape = cls._read(config, vocab_multiple)
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from error
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"a value is of the wrong kind ({error})") from error
        sizes = ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "head_dim",
                 "vocab_size")  # fmt: skip
        if wrong := [f"{name} {getattr(shape, name)}" for name in sizes if not 0 < getattr(shape, name) < _LARGEST]:
            raise ValueError(f"no model has {', '.join(wrong)}")
        if shape.num_attention_heads % shape.num_query_groups:
            raise ValueError(
                f"{shape.num_attention_heads} attention heads do not share {shape.num_query_groups} key/value heads"
            )
        if shape.num_experts and not 0 < shape.num_experts_per_token <= shape.num_experts:
            raise ValueError(f"num_experts_per_tok {shape.num_experts_per_token} of {shape.num_experts} experts")
        if shape.num_experts and shape.num_experts_per_token == 1 and shape.has_normalized_expert_probs:
            raise ValueError(
                "num_experts_per_tok=1 with norm_topk_prob=true is not supported: the one expert has weight 1 and the "
                "router no gradient, and Megatron's router refuses it"
            )
        return shape

    @classmethod
    def _read(cls, config: Mapping[str, Any], vocab_multiple: int) -> ModelShape:
        model_type = str(config.get("model_type", ""))
        if model_type not in ARCHITECTURES:
            raise ValueError(f"model_type {model_type!r} has no mapping to Megatron; known: {', '.join(ARCHITECTURES)}")
        _refuse_unmapped(config, model_type)
        _refuse_contradictions(config)
        config = {**_DEFAULTS[model_type], **config}
        if quantization := config.get("quantization_config") or config.get("compression_config"):
            method = dict(quantization).get("quant_method", "unknown")
            raise ValueError(
                f"the weights are quantised (quantization_config, quant_method {method}) and their scales have no "
                "mapping: start from the unquantised checkpoint"
            )
        heads = int(config["num_attention_heads"])
        # transformers 5 writes the second, 4 the first
        experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
        layers = int(config["num_hidden_layers"])
        theta, scaling = _rope(config)
        return cls(
            model_type=model_type,
            hidden_size=int(config["hidden_size"]),
            ffn_hidden_size=int(config["intermediate_size"]),
            num_layers=layers,
            num_attention_heads=heads,
            num_query_groups=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            vocab_size=int(config["vocab_size"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            has_qkv_bias=model_type == "qwen2",
            has_qk_norm=model_type in _WITH_QK_NORM,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(theta),
            rope_scaling=scaling,
            max_position_embeddings=int(config.get("max_position_embeddings") or 0),
            vocab_multiple=vocab_multiple,
            num_experts=experts,
            moe_ffn_hidden_size=int(config["moe_intermediate_size"]) if experts else 0,
            num_experts_per_token=int(config["num_experts_per_tok"]) if experts else 0,
            has_normalized_expert_probs=bool(config.get("norm_topk_prob")) if experts else False,
            dense_layers=_dense_layers(config, layers) if experts else (),
        )


def _refuse_unmapped(config: Mapping[str, Any], model_type: str) -> None:
    """Raise ValueError for an option that would load without an error and compute something else."""
    for name, neutral in _NEUTRAL.items():
        value = config.get(name)
        if value is None or value is False or value in neutral:
            continue
        wanted = f": only {' and '.join(map(repr, neutral))} can be mapped" if neutral else ""
        raise ValueError(f"{name}={value!r} in config.json of a {model_type} model is not supported{wanted}")
    other = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise ValueError(f"layer_types names {', '.join(other)}: only full_attention is supported")
    normed = config.get("use_qk_norm")  # Qwen3-Coder's says what its architecture does
    if normed is not None and bool(normed) is not (model_type in _WITH_QK_NORM):
        raise ValueError(f"use_qk_norm={normed!r} in config.json of a {model_type} model is not supported")
    # Qwen's have a switch of their own, off by default; of a Llama with a window transformers sees none and vLLM one.
    window = config.get("sliding_window", 4096 if model_type == "mistral" else None)
    if window is not None and model_type in ("llama", "mistral"):
        raise ValueError(
            f"sliding_window={window!r} in config.json of a {model_type} model is not supported: only null"
        )
    if config.get("is_causal") is False:
        raise ValueError("is_causal=False: an encoder, which predicts no next token")
    heads = config.get("architectures") or [ARCHITECTURES[model_type]]
    if ARCHITECTURES[model_type] not in heads:
        raise ValueError(
            f"architectures names {', '.join(map(str, heads))}: only {ARCHITECTURES[model_type]} is a policy that "
            "engines sample from"
        )


def _refuse_contradictions(config: Mapping[str, Any]) -> None:
    """Raise ValueError where transformers 4's spelling of an option and 5's say different things: who adds a model
    card's ``rope_scaling`` to a file of transformers 5 means that, and not every reader follows it."""
    new, old = (dict(config.get(name) or {}) for name in ("rope_parameters", "rope_scaling"))
    bases = {rope.pop("rope_theta", None) for rope in (new, old)} | {config.get("rope_theta")}
    scalings = [{"rope_type" if key == "type" else key: value for key, value in rope.items()} for rope in (new, old)]
    experts = {config.get("num_experts"), config.get("num_local_experts")}
    for names, differ in {
        "rope_parameters and rope_scaling": all(scalings) and scalings[0] != scalings[1],
        "rope_theta and that of the rotary parameters": len(bases - {None}) > 1,
        "num_experts and num_local_experts": len(experts - {None}) > 1,
    }.items():
        if differ:
            raise ValueError(f"{names} in config.json differ: keep the one that is meant")


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Base and scaling of the rotary embedding; an empty scaling is a plain one."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError("rope_parameters differ by layer type, which has no mapping")
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if rope.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise ValueError("partial_rotary_factor in rope_parameters is not supported: only 1.0 can be mapped")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        rest = sorted(rope.keys() - {"rope_type", "type", "factor"})
        if rest:
            raise ValueError(f"{', '.join(rest)} in the rotary parameters has no mapping")
        return float(theta), {}
    if kind != "llama3":
        raise ValueError(f"rotary embeddings of type {kind!r} have no mapping: only 'default' and 'llama3' do")
    scaling = {name: value for name, value in rope.items() if name not in ("type", "rope_type")}
    constants = {name: value for name, value in scaling.items() if name != "factor"}
    if "factor" not in scaling or constants != _LLAMA3_CONSTANTS:
        raise ValueError(
            f"rotary parameters {scaling} of type 'llama3' are not those that Megatron computes with: a factor and "
            f"{dict(_LLAMA3_CONSTANTS)}"
        )
    return float(theta), {"rope_type": "llama3", **scaling}


def _dense_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    listed = set(config.get("mlp_only_layers") or ())
    step = int(config.get("decoder_sparse_step") or 1)
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterSpec:
    """One Megatron parameter and the HF tensors it is made of."""

    megatron_name: str  # with the GLOBAL layer (and expert) number, in the local (non-TE) spelling
    hf_names: tuple[str, ...]  # QKV: q, k, v; GATE_UP: gate, up; else one
    kind: ParameterKind = ParameterKind.PLAIN
    shard_dim: int | None = None  # dimension cut by TP; None = whole on every rank that has it
    expert: int | None = None  # GLOBAL number of the expert it belongs to; expert_owner() says which EP rank has it
    alternatives: tuple[str, ...] = ()  # what other Megatron specs (Transformer Engine) call the same parameter
    tied_copies: tuple[str, ...] = ()  # further Megatron parameters with the same values (tied head on the last stage)


@functools.lru_cache(maxsize=8)  # of 235B 37,000 entries, and a plan asks a hundred times
def parameter_map(shape: ModelShape) -> tuple[ParameterSpec, ...]:
    """Every parameter of the model in layer order: embedding, layers 0..N-1, final norm, output layer (if untied)."""
    specs = [
        ParameterSpec(
            megatron_name="embedding.word_embeddings.weight",
            hf_names=("model.embed_tokens.weight",),
            kind=ParameterKind.VOCAB,
            shard_dim=0,
            tied_copies=("output_layer.weight",) if shape.tied_embeddings else (),
        )
    ]
    for layer in range(shape.num_layers):
        specs += _attention_specs(shape, layer)
        is_moe = shape.num_experts > 0 and layer not in shape.dense_layers
        specs += _moe_specs(shape, layer) if is_moe else _mlp_specs(layer)
    specs.append(ParameterSpec(megatron_name="decoder.final_layernorm.weight", hf_names=("model.norm.weight",)))
    if not shape.tied_embeddings:
        specs.append(
            ParameterSpec(
                megatron_name="output_layer.weight",
                hf_names=("lm_head.weight",),
                kind=ParameterKind.VOCAB,
                shard_dim=0,
            )
        )
    return tuple(specs)


def _attention_specs(shape: ModelShape, layer: int) -> list[ParameterSpec]:
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    specs = [
        ParameterSpec(
            megatron_name=f"{megatron}.input_layernorm.weight",
            alternatives=(f"{megatron}.self_attention.linear_qkv.layer_norm_weight",),
            hf_names=(f"{hf}.input_layernorm.weight",),
        )
    ]
    specs += [
        ParameterSpec(
            megatron_name=f"{megatron}.self_attention.linear_qkv.{part}",
            hf_names=tuple(f"{hf}.self_attn.{p}_proj.{part}" for p in "qkv"),
            kind=ParameterKind.QKV,
            shard_dim=0,
        )
        for part in (("weight", "bias") if shape.has_qkv_bias else ("weight",))
    ]
    if shape.has_qk_norm:
        specs += [
            ParameterSpec(
                megatron_name=f"{megatron}.self_attention.{p}_layernorm.weight",
                hf_names=(f"{hf}.self_attn.{p}_norm.weight",),
            )
            for p in "qk"
        ]
    specs.append(
        ParameterSpec(
            megatron_name=f"{megatron}.self_attention.linear_proj.weight",
            hf_names=(f"{hf}.self_attn.o_proj.weight",),
            shard_dim=1,
        )
    )
    return specs


def _mlp_specs(layer: int) -> list[ParameterSpec]:
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    return [
        ParameterSpec(
            megatron_name=f"{megatron}.pre_mlp_layernorm.weight",
            alternatives=(f"{megatron}.mlp.linear_fc1.layer_norm_weight",),
            hf_names=(f"{hf}.post_attention_layernorm.weight",),
        ),
        ParameterSpec(
            megatron_name=f"{megatron}.mlp.linear_fc1.weight",
            hf_names=(f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"),
            kind=ParameterKind.GATE_UP,
            shard_dim=0,
        ),
        ParameterSpec(
            megatron_name=f"{megatron}.mlp.linear_fc2.weight", hf_names=(f"{hf}.mlp.down_proj.weight",), shard_dim=1
        ),
    ]


def _moe_specs(shape: ModelShape, layer: int) -> list[ParameterSpec]:
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    specs = [
        ParameterSpec(
            megatron_name=f"{megatron}.pre_mlp_layernorm.weight", hf_names=(f"{hf}.post_attention_layernorm.weight",)
        ),
        ParameterSpec(megatron_name=f"{megatron}.mlp.router.weight", hf_names=(f"{hf}.mlp.gate.weight",)),
    ]
    for expert in range(shape.num_experts):
        ours, theirs = f"{megatron}.mlp.experts", f"{hf}.mlp.experts.{expert}"
        specs += [
            ParameterSpec(
                megatron_name=f"{ours}.local_experts.{expert}.linear_fc1.weight",
                alternatives=(f"{ours}.linear_fc1.weight{expert}",),
                hf_names=(f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"),
                kind=ParameterKind.GATE_UP,
                expert=expert,
            ),
            ParameterSpec(
                megatron_name=f"{ours}.local_experts.{expert}.linear_fc2.weight",
                alternatives=(f"{ours}.linear_fc2.weight{expert}",),
                hf_names=(f"{theirs}.down_proj.weight",),
                expert=expert,
            ),
        ]
    return specs


def resolve_name(spec: ParameterSpec, names: Collection[str]) -> str | None:
    """Under which of its names ``names`` holds the parameter, or None.  Tied copies do not count."""
    return next((name for name in (spec.megatron_name, *spec.alternatives) if name in names), None)


def expert_owner(expert: int, num_experts: int, ep_size: int) -> int:
    """Rank, in every expert-parallel group, that holds global ``expert``: consecutive experts lie together."""
    return expert * ep_size // num_experts


def padded_vocab_size(vocab_size: int, tp_size: int, multiple: int = 1) -> int:
    """Rows of Megatron's vocabulary: the next multiple of ``multiple * tp_size``."""
    step = multiple * tp_size
    return -(-vocab_size // step) * step


def hf_shapes(spec: ParameterSpec, shape: ModelShape) -> tuple[tuple[int, ...], ...]:
    """Full HF shape of each of ``spec.hf_names``, from the model's numbers alone."""
    hidden = shape.hidden_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    name = spec.hf_names[0]
    ffn = shape.moe_ffn_hidden_size if ".mlp.experts." in name else shape.ffn_hidden_size
    if spec.kind is ParameterKind.VOCAB:
        return ((shape.vocab_size, hidden),)
    if spec.kind is ParameterKind.QKV:
        rest = () if name.endswith(".bias") else (hidden,)
        return ((query, *rest), (key, *rest), (key, *rest))
    if spec.kind is ParameterKind.GATE_UP:
        return ((ffn, hidden), (ffn, hidden))
    if name.endswith(".o_proj.weight"):
        return ((hidden, query),)
    if name.endswith(".down_proj.weight"):
        return ((hidden, ffn),)
    if name.endswith(".mlp.gate.weight"):
        return ((shape.num_experts, hidden),)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return ((shape.head_dim,),)
    return ((hidden,),)


def shard_shape(spec: ParameterSpec, shape: ModelShape, tp_size: int) -> tuple[int, ...]:
    """Shape of one TP rank's shard.  Raises ValueError when the model cannot be cut into ``tp_size`` parts."""
    full = hf_shapes(spec, shape)
    if spec.kind is ParameterKind.VOCAB:
        rows = padded_vocab_size(shape.vocab_size, tp_size, shape.vocab_multiple)
        return (rows // tp_size, *full[0][1:])
    if spec.kind is ParameterKind.QKV and shape.num_query_groups % tp_size:
        raise ValueError(
            f"tensor_parallel {tp_size} does not divide {shape.num_query_groups} key/value heads: "
            "sharing one key/value head between TP ranks is not supported, use a smaller tensor_parallel"
        )
    # Composite kinds stack their parts along dimension 0.
    whole = [sum(part[0] for part in full), *full[0][1:]]
    if spec.shard_dim is None:
        return tuple(whole)
    if any(part[spec.shard_dim] % tp_size for part in full):
        raise ValueError(f"{spec.megatron_name}: dimension {spec.shard_dim} of {full} is not divisible by TP {tp_size}")
    whole[spec.shard_dim] //= tp_size
    return tuple(whole)


def to_megatron(
    spec: ParameterSpec, hf: Mapping[str, Tensor], *, tp_rank: int, tp_size: int, shape: ModelShape
) -> Tensor:
    """Cut one TP rank's Megatron shard out of full HF tensors; no collective, values and dtype unchanged.

    ``hf`` holds the full tensors of ``spec.hf_names`` with the shapes of :func:`hf_shapes`.  Returns a contiguous
    tensor of :func:`shard_shape`; it may share memory with ``hf``.  Raises KeyError for a missing and ValueError for
    a misshapen one.
    """
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank {tp_rank} is not in 0..{tp_size - 1}")
    tensors = [
        _checked(hf, name, expected) for name, expected in zip(spec.hf_names, hf_shapes(spec, shape), strict=True)
    ]
    shard_shape(spec, shape, tp_size)  # refuses what cannot be cut
    if spec.kind is ParameterKind.QKV:
        groups = _by_group(tensors, shape)
        return groups.chunk(tp_size, 0)[tp_rank].reshape(-1, *tensors[0].shape[1:]).contiguous()
    if spec.kind is ParameterKind.GATE_UP:
        parts = tensors if spec.shard_dim is None else [t.chunk(tp_size, 0)[tp_rank] for t in tensors]
        return _cat(parts)
    full = tensors[0]
    if spec.kind is ParameterKind.VOCAB:
        rows = padded_vocab_size(shape.vocab_size, tp_size, shape.vocab_multiple) // tp_size
        part = full[tp_rank * rows : (tp_rank + 1) * rows]
        padding = part.new_zeros(rows - len(part), *part.shape[1:])
        return _cat([part, padding]) if len(padding) else part.contiguous()
    if spec.shard_dim is None:
        return full.contiguous()
    return full.chunk(tp_size, spec.shard_dim)[tp_rank].contiguous()


def to_hf(spec: ParameterSpec, shards: Sequence[Tensor], *, shape: ModelShape) -> dict[str, Tensor]:
    """Put the TP shards of one parameter (in TP order) together to full HF tensors; the inverse of :func:`to_megatron`.

    Vocabulary padding is cut off whatever its size.  A replicated parameter is taken from the first shard.  The
    results are contiguous and may share memory with ``shards``.  Raises ValueError when the shapes do not add up.
    """
    if spec.shard_dim is None:
        shards = shards[:1]
    if spec.kind is ParameterKind.QKV:
        parts = _from_groups(_cat(list(shards)) if len(shards) > 1 else shards[0], shape)
    elif spec.kind is ParameterKind.GATE_UP:
        halves = [shard.chunk(2, 0) for shard in shards]
        parts = [_cat(list(half)) if len(half) > 1 else half[0] for half in zip(*halves, strict=True)]
    else:
        full = _cat(list(shards), spec.shard_dim or 0) if len(shards) > 1 else shards[0]
        parts = [full[: shape.vocab_size] if spec.kind is ParameterKind.VOCAB else full]
    expected = hf_shapes(spec, shape)
    if [tuple(p.shape) for p in parts] != list(expected):
        raise ValueError(
            f"{spec.megatron_name}: {len(shards)} shards of {[tuple(s.shape) for s in shards]} give "
            f"{[tuple(p.shape) for p in parts]}, expected {list(expected)}"
        )
    return {name: part.contiguous() for name, part in zip(spec.hf_names, parts, strict=True)}


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(list(tensors), dim)


def _checked(hf: Mapping[str, Tensor], name: str, expected: tuple[int, ...]) -> Tensor:
    if name not in hf:
        raise KeyError(f"the HF checkpoint has no tensor {name!r}")
    if tuple(hf[name].shape) != expected:
        raise ValueError(f"{name} has shape {tuple(hf[name].shape)}, config.json says {expected}")
    return hf[name]


def _by_group(qkv: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """q [NH*D, ...], k and v [NG*D, ...] -> [NG, (NH/NG + 2) * D, ...]."""
    rest = qkv[0].shape[1:]
    return _cat([t.reshape(shape.num_query_groups, -1, *rest) for t in qkv], dim=1)


def _from_groups(fused: Tensor, shape: ModelShape) -> list[Tensor]:
    """[NG * (NH/NG + 2) * D, ...] -> q, k, v."""
    rest = fused.shape[1:]
    per_group = shape.num_attention_heads // shape.num_query_groups * shape.head_dim
    groups = fused.reshape(shape.num_query_groups, -1, *rest)
    parts = groups.split([per_group, shape.head_dim, shape.head_dim], dim=1)
    return [part.reshape(-1, *rest) for part in parts]
