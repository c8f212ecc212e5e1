"""A small Qwen3-architecture model with random weights as an HF folder: what the CPU demo starts from.

python -m megatron_rest.commands.init_model --tokenizer DIR --output DIR [--hidden-size 256 --layers 4 ...]
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_rest.config import ConfigError
from megatron_rest.hf_folder import load_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Write config.json, tokenizer files and model.safetensors; the same seed gives the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="HF tokenizer folder; the model's vocabulary is its size")
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_argument("--hidden-size", type=int, default=256, help="model width (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="transformer layers (%(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (%(default)s)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key/value heads (%(default)s)")
    parser.add_argument("--ffn-size", type=int, default=768, help="SwiGLU width (%(default)s)")
    parser.add_argument("--max-length", type=int, default=2048, help="longest sequence (%(default)s)")
    parser.add_argument("--untied", action="store_true", help="separate output layer instead of the input embedding")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights (%(default)s)")
    args = parser.parse_args(argv)

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one file in a few milliseconds
    output = Path(args.output)
    if output.exists():
        parser.error(f"{output} exists already: remove it or choose another --output")
    try:
        tokenizer = load_tokenizer(args.tokenizer)
    except ConfigError as error:
        parser.error(str(error))
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden_size // args.heads,
        max_position_embeddings=args.max_length,
        tie_word_embeddings=not args.untied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)
    count = sum(p.numel() for p in model.parameters())
    print(f"{output}: Qwen3 architecture, {count / 1e6:.1f} M parameters, vocabulary {len(tokenizer)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
