"""The model's numbers without its weights: from ``config.json``, or for a laptop that has no copy, from a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rest.config import ConfigError
from megatron_rest.model_map import ModelShape

__all__ = ["PUBLISHED", "find_shape"]

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "Llama-3.3-70B": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "Llama-3.1-405B": {
        "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "Qwen2.5-72B": {
        "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
    },
    "Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "Qwen3-32B": {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 40960,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 40960,
    },
}  # fmt: skip
"""The numbers of their published ``config.json`` that decide sizes, by the start of the folder's name."""


def find_shape(model_path: str, name: str = "") -> tuple[ModelShape, str]:
    """Shape of ``model_path`` and where it was found.

    A folder on this machine wins over the table, where ``name`` (``model.shape``) or else the folder's name is looked
    up.  Raises :class:`ConfigError` when neither knows the model.
    """
    file = Path(model_path) / "config.json"
    if file.is_file():
        try:
            return ModelShape.from_hf_config(json.loads(file.read_text(encoding="utf-8"))), str(file)
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            raise ConfigError(f"model.path: {file} is not a usable model configuration: {error}") from error
    known = _named(name) if name else next((k for k in PUBLISHED if Path(model_path).name.startswith(k)), "")
    if known:
        return ModelShape.from_hf_config(PUBLISHED[known]), f"published numbers of {known} ({model_path} is not here)"
    raise ConfigError(
        f"model.path: {model_path or '(empty)'} is not on this machine, and its name starts with none of "
        f"{', '.join(PUBLISHED)}: name one as model.shape, or the folder of a config.json as model.path"
    )


def _named(name: str) -> str:
    """The published model that has the words of ``name`` in this order: llama-70b is Llama-3.3-70B."""
    words = [word for word in name.lower().replace("_", "-").split("-") if word]
    found = [known for known in PUBLISHED if words and _in_order(words, known.lower().split("-"))]
    if len(found) != 1:
        what = f"may be {' or '.join(found)}" if found else f"is none of {', '.join(PUBLISHED)}"
        raise ConfigError(f"model.shape={name} {what}")
    return found[0]


def _in_order(words: list[str], among: list[str]) -> bool:
    rest = iter(among)
    return all(word in rest for word in words)
