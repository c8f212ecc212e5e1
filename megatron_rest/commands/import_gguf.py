"""A GGUF file as an HF folder that training, vLLM and transformers load: ``megatron-rest import-gguf``.

Weights are dequantised by the library ``gguf`` and written as they are read, some megabytes at a time, so the largest
model takes no more memory than the smallest.  What the file does not say exactly, or says of a model that training does
not map, is refused before anything is written; the folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rest.config import ConfigError
from megatron_rest.hf_folder import load_tokenizer
from megatron_rest.model_map import ARCHITECTURES, ModelShape, hf_shapes, parameter_map

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["import_gguf", "main"]

_CLASSES = {name: ARCHITECTURES[name] for name in ("llama", "qwen2", "qwen3")}
_BLOCK_BYTES = 32 << 20  # of float32 values at a time
# Keys of ``<architecture>.*`` that are read below or change nothing; any other may change what the model computes.
_READ_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "expert_count",
    "expert_used_count",
}  # fmt: skip
_TENSORS = {  # HF's name of a layer's tensor: GGUF's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling, as the divisors that come out of it
_UNUSED, _CONTROL, _USER_DEFINED = 5, 3, 4  # gguf.TokenType
_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """One HF tensor as the file holds it."""

    name: str
    data: np.ndarray  # raw rows, memory-mapped
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    rows: np.ndarray | None = None  # order of the rows in HF; None = the file's

    def blocks(self) -> Iterator[np.ndarray]:
        """float32 values, some rows at a time.  Raises ConfigError for what no weight can be."""
        from gguf.quants import dequantize

        step = max(_BLOCK_BYTES // (4 * math.prod(self.shape[1:])), 1)
        for start in range(0, self.shape[0], step):
            part = slice(start, start + step)
            raw = self.data[part] if self.rows is None else self.data[self.rows[part]]
            with np.errstate(all="ignore"):  # a damaged scale; said below
                values = np.array(dequantize(raw, self.kind), dtype=np.float32)  # a copy that can be written to
            if not np.isfinite(values).all():
                raise ConfigError(f"{self.name} holds values that are not finite: is the file damaged?")
            yield values


def import_gguf(file: str | Path, output: str | Path, *, dtype: str = "float32", tokenizer: str | Path = "") -> str:
    """Write the HF folder ``output`` of ``file``; returns what it is, in one line.

    Args:
        file: GGUF, little endian, architecture llama, qwen2 or qwen3.
        output: folder to write; must not exist.
        dtype: of the weights: float32 (no dequantised value is rounded), bfloat16 or float16.
        tokenizer: HF folder whose tokenizer is taken instead of the file's, which then only checks its vocabulary.

    Raises :class:`ConfigError` for a file that is broken or whose model or tokenizer has no exact HF form.
    """
    file, output = Path(file), Path(output)
    if output.exists():
        raise ConfigError(f"{output} exists already: remove it or choose another --output")
    tensors, fields = _read(file)
    config = _config(fields, tensors)
    try:
        shape = ModelShape.from_hf_config(config)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    stored = _match(tensors, shape)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        chosen = load_tokenizer(tokenizer) if tokenizer else _tokenizer(fields)
        _check_vocabulary(chosen, fields, shape.vocab_size)
        chosen.save_pretrained(partial)
        _write_json(partial / "config.json", config | {"dtype": dtype})
        _write_json(partial / "generation_config.json", _generation(fields))
        _write_weights(partial / "model.safetensors", stored, dtype)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    count = sum(math.prod(tensor.shape) for tensor in stored)
    kinds = ", ".join(sorted({tensor.kind.name for tensor in stored}))
    head = "tied head" if shape.tied_embeddings else "untied head"
    return (
        f"{output}: {_CLASSES[shape.model_type].removesuffix('ForCausalLM')} architecture, {count / 1e6:.1f} M "
        f"parameters from {kinds} to {dtype}, {head}, vocabulary {shape.vocab_size}"
    )


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors by name (memory-mapped) and values of the header.  ConfigError for a broken file."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ConfigError("the library gguf is not installed: make setup, or pip install gguf") from error

    class Reader(GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            # numpy would return less than asked for at the end of the file, and a length that lies would loop for ever.
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, inside of what its header announces")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(file)
        if reader.byte_order != "I":
            raise ValueError("it is big-endian; convert a little-endian one")
        return {t.name: t for t in reader.tensors}, {name: f.contents() for name, f in reader.fields.items()}
    except OSError as error:
        raise ConfigError(f"cannot read {file} ({error.strerror or error})") from error
    except Exception as error:  # the library parses with whatever numpy and enum raise
        raise ConfigError(f"{file} is no GGUF file that can be read: {error or type(error).__name__}") from error


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``.  ConfigError for an architecture or a key that has no place there."""
    arch = fields.get("general.architecture")
    if arch not in _CLASSES:
        raise ConfigError(f"architecture {arch!r} is not supported: known are {', '.join(_CLASSES)}")
    values = {name.removeprefix(f"{arch}."): v for name, v in fields.items() if name.startswith(f"{arch}.")}
    if unread := sorted(values.keys() - _READ_KEYS):
        raise ConfigError(f"{arch}.{unread[0]} has no place in config.json, and leaving it out would change the model")
    if values.get("expert_count") or values.get("expert_used_count"):
        raise ConfigError(f"{arch}.expert_count is {values.get('expert_count')}: models with experts are not supported")
    if values.get("rope.scaling.type", "none") != "none":
        raise ConfigError(f"{arch}.rope.scaling.type {values['rope.scaling.type']!r} is not supported")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise ConfigError("token_embd.weight, a matrix, is missing")
    try:
        heads, hidden = int(values["attention.head_count"]), int(values["embedding_length"])
        head_dim = int(values.get("attention.key_length") or hidden // heads)
        theta = _shortest(values.get("rope.freq_base", 10000.0))
        config: dict[str, Any] = {
            "architectures": [_CLASSES[arch]],
            "model_type": arch,
            "hidden_size": hidden,
            "intermediate_size": int(values["feed_forward_length"]),
            "num_hidden_layers": int(values["block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(values.get("attention.head_count_kv") or heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": int(values["context_length"]),
            "rms_norm_eps": _shortest(values["attention.layer_norm_rms_epsilon"]),
            "rope_theta": theta,
            "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": False,
            **_special_ids(fields),
        }
        if (layers := int(values["block_count"])) > len(tensors):
            raise ConfigError(f"{arch}.block_count is {layers}, and the file has {len(tensors)} tensors in all")
        for key in ("attention.value_length", "rope.dimension_count"):
            if int(values.get(key) or head_dim) != head_dim:
                raise ConfigError(f"{arch}.{key} is {values[key]}, but a head has {head_dim} dimensions")
    except KeyError as error:
        raise ConfigError(f"{arch}.{error.args[0]} is missing") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"a value of {arch}.* is of the wrong kind ({error})") from error
    if _ROPE_FACTORS in tensors:
        config["rope_scaling"] = _llama3_scaling(tensors[_ROPE_FACTORS], theta, head_dim)
    if arch == "qwen2":
        del config["head_dim"], config["attention_bias"]  # not options of that class
        if head_dim * heads != hidden:
            raise ConfigError(f"heads of {head_dim} dimensions do not make up {hidden} in a qwen2 model")
    return config


def _llama3_scaling(stored: Any, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters from which Llama 3.1's divisors are made; ConfigError unless the file's come out of them."""
    found = np.asarray(stored.data, dtype=np.float64).ravel()
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, original, factor = 1.0, 4.0, 8192, float(found.max(initial=1.0))
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    if found.shape != wavelengths.shape or not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise ConfigError(f"{_ROPE_FACTORS} is not the scaling of Llama 3.1 (low 1, high 4, original context 8192)")
    return {
        "rope_type": "llama3", "factor": _shortest(factor), "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def _shortest(value: Any) -> float:
    """The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _match(tensors: Mapping[str, Any], shape: ModelShape) -> list[_Stored]:
    """HF's tensors in the map's order.  ConfigError unless the file has exactly those, in their shapes."""
    left = {name: tensor for name, tensor in tensors.items() if name != _ROPE_FACTORS}
    found = []
    for spec in parameter_map(shape):
        for name, wanted in zip(spec.hf_names, hf_shapes(spec, shape), strict=True):
            stored = left.pop(gguf := _gguf_name(name), None)
            if stored is None:
                raise ConfigError(f"{gguf} is missing, which {name} is made of")
            has = tuple(int(n) for n in reversed(stored.shape))
            if has != wanted:
                raise ConfigError(f"{gguf} has the shape {has}, the header's numbers give {wanted}")
            _check_kind(stored)
            rows = None
            if shape.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                rows = _rotary_rows(wanted[0], shape.head_dim)
            found.append(_Stored(name=name, data=stored.data, kind=stored.tensor_type, shape=wanted, rows=rows))
    if left:
        raise ConfigError(f"{min(left)} has no place in a {shape.model_type} model ({len(left)} such tensors)")
    return found


def _gguf_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_TENSORS[part]}.{kind}"


def _rotary_rows(count: int, head_dim: int) -> np.ndarray:
    """Rows of Q or K in HF's order: GGUF keeps the two of a rotated pair side by side, HF in the halves of a head."""
    return np.arange(count).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _check_kind(stored: Any) -> None:
    """One row now, so that a quantisation nobody can read is known before anything is written."""
    from gguf.quants import dequantize

    try:
        with np.errstate(all="ignore"):
            dequantize(stored.data[:1], stored.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"{stored.name}: {error} in the library gguf") from error


def _write_weights(path: Path, stored: Sequence[_Stored], dtype: str) -> None:
    """A safetensors file (8 bytes of length, a JSON header, the tensors' bytes), tensor after tensor."""
    import torch

    code, width = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in stored:
        start, end = end, end + math.prod(tensor.shape) * width
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in stored:
            for values in tensor.blocks():
                rounded: Tensor = torch.from_numpy(values).to(getattr(torch, dtype))
                if not bool(rounded.isfinite().all()):
                    raise ConfigError(f"{tensor.name} has values beyond the range of {dtype}: choose another --dtype")
                out.write(rounded.contiguous().view(torch.uint8).numpy().tobytes())


def _tokenizer(fields: Mapping[str, Any]) -> Any:
    """A byte-level BPE tokenizer with the file's template; ConfigError for kinds whose HF form is not known exactly."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    kind, words = fields.get("tokenizer.ggml.model"), str(fields.get("tokenizer.ggml.pre", ""))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    after_split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits: dict[str, list[Any]] = {
        "gpt-2": [byte_level],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "qwen2": [pre_tokenizers.Split(Regex(_GPT4_WORDS % ""), "isolated"), after_split],
        "llama-bpe": [pre_tokenizers.Split(Regex(_GPT4_WORDS % "{1,3}"), "isolated"), after_split],
    }
    if kind != "gpt2" or words not in splits:
        raise ConfigError(
            f"a tokenizer of the kind {kind!r} that cuts words as {words!r} is not supported (known: byte-level BPE, "
            f"{', '.join(splits)}): give the model's own with --tokenizer HF_FOLDER"
        )
    tokens, kinds = _tokens(fields)
    try:
        merges = [_pair(str(merge)) for merge in fields.get("tokenizer.ggml.merges", [])]
        vocab = {token: i for i, (token, t) in enumerate(zip(tokens, kinds, strict=True)) if t != _UNUSED}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=words == "llama-bpe"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(f"the tokenizer of the file is damaged: {error}") from error
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=t == _CONTROL, normalized=False)
            for token, t in zip(tokens, kinds, strict=True)
            if t in (_CONTROL, _USER_DEFINED)
        ]
    )
    names = {name: _token(tokens, fields, key) for name, key in _SPECIAL.items()}
    bos, bos_id = names["bos_token"], fields.get("tokenizer.ggml.bos_token_id")
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", words == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, int(bos_id or 0))]
        )
    template = fields.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
        **({"chat_template": str(template)} if template else {}),
    )


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


_SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}  # fmt: skip


def _tokens(fields: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = [str(token) for token in fields.get("tokenizer.ggml.tokens", [])]
    kinds = [int(kind) for kind in fields.get("tokenizer.ggml.token_type", [1] * len(tokens))]
    if not tokens or len(kinds) != len(tokens):
        raise ConfigError(f"tokenizer.ggml has {len(tokens)} tokens and {len(kinds)} kinds of them")
    return tokens, kinds


def _token(tokens: Sequence[str], fields: Mapping[str, Any], key: str) -> str | None:
    number = fields.get(f"tokenizer.ggml.{key}")
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise ConfigError(f"tokenizer.ggml.{key} is {number}, which is no token of {len(tokens)}")
    return tokens[number]


def _check_vocabulary(tokenizer: Any, fields: Mapping[str, Any], rows: int) -> None:
    """Every token has the id that its embedding has."""
    tokens, kinds = _tokens(fields)
    if len(tokens) > rows:
        raise ConfigError(f"the tokenizer has {len(tokens)} tokens, the embedding {rows} rows")
    vocab = tokenizer.get_vocab()
    plain = [i for i, kind in enumerate(kinds) if kind != _UNUSED]
    wrong = next((i for i in plain if vocab.get(tokens[i]) != i), None)
    if wrong is not None:
        raise ConfigError(f"token {wrong}, {tokens[wrong]!r}, has the id {vocab.get(tokens[wrong])} in the tokenizer")
    if extra := sorted(vocab.keys() - {tokens[i] for i in plain}):
        raise ConfigError(f"the tokenizer has {extra[0]!r}, which the file does not have ({len(extra)} such tokens)")


def _special_ids(fields: Mapping[str, Any]) -> dict[str, int | None]:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {name: fields.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}


def _generation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``generation_config.json``: every end that the file names."""
    ids: dict[str, Any] = {name: i for name, i in _special_ids(fields).items() if i is not None}
    ends = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    if named := list(dict.fromkeys(i for i in ends if i is not None)):
        ids["eos_token_id"] = named if len(named) > 1 else named[0]
    return ids


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="megatron-rest import-gguf",
        description="A GGUF file (Llama, Qwen2 or Qwen3 architecture, any quantisation that the library gguf reads) as "
        "an HF folder: config.json, model.safetensors, tokenizer, chat template, generation_config.json.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the GGUF file")
    parser.add_argument("--output", type=Path, required=True, metavar="HF_FOLDER", help="to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights; float32 rounds nothing (%(default)s)",
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="HF_FOLDER", help="tokenizer instead of the file's (whose ids it must have)"
    )
    args = parser.parse_args(argv)
    try:
        print(import_gguf(args.file, args.output, dtype=args.dtype, tokenizer=args.tokenizer))
    except (ConfigError, OSError) as error:
        print(f"megatron-rest import-gguf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
