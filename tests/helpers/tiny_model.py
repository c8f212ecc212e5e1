"""Tiny random checkpoints in Hugging Face's format, with a byte-level tokenizer; made in memory, no network.

    folder = build_tiny_model(tmp_path / "a", arch="qwen3", tied=True, seed=0)

The tokenizer has one token a byte plus the specials below, so that ``len(tokenizer)`` is the model's vocabulary and
any id a random model samples can be decoded.  Norm weights are random too: a norm put in the wrong place must show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["EOS_ID", "SPECIAL_TOKENS", "VOCAB_SIZE", "build_tiny_model", "build_tokenizer", "perturb", "read_config"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<response>",
    "</response>",
)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
EOS_ID = 256 + SPECIAL_TOKENS.index("<|im_end|>")


def build_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges to ``folder``; ids 0..255 are bytes, then the specials."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)


def build_tiny_model(
    folder: Path | str,
    *,
    arch: str = "qwen3",
    tied: bool = True,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and a tokenizer; returns the folder.

    ``arch``: qwen3, qwen2, llama or qwen3_moe.  ``overrides`` go to the HF configuration.
    """
    import transformers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM's CPU attention takes; not hidden / heads, on purpose
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": 256,
        "initializer_range": 0.1,
        **overrides,
    }
    if arch == "qwen3_moe":
        settings |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            **overrides,
        }
    config = transformers.AutoConfig.for_model(arch, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter) if "norm" in name else torch.randn_like(parameter))
    model.save_pretrained(folder)
    if with_tokenizer:
        build_tokenizer(folder)
    return folder


def perturb(state: dict[str, torch.Tensor], *, scale: float = 0.3, seed: int = 1) -> dict[str, torch.Tensor]:
    """The same tensors moved far enough that another model answers; new storage."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() + scale * t.float().std() * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for name, t in state.items()
    }


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder."""
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
