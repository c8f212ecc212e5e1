"""A Hugging Face folder is data: configuration, tokenizer, safetensors.  Python that comes with one is never run.

Megatron builds the model from numbers in ``config.json`` and vLLM from a class of its own, so nothing here ever needs
``trust_remote_code``, and there is no option for it.  A folder that asks for it is refused by name instead of being
loaded as something else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rest.config import ConfigError

__all__ = ["load_tokenizer", "refuse_remote_code"]

_FILES = ("config.json", "tokenizer_config.json")  # whose ``auto_map`` transformers and vLLM would follow


def refuse_remote_code(folder: str | Path) -> None:
    """Raise :class:`ConfigError` if a configuration in ``folder`` names Python to be loaded (``auto_map``).

    Files that are missing or no JSON are for their readers to complain about.
    """
    for name in _FILES:
        file = Path(folder) / name
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(values, dict) and values.get("auto_map"):
            raise ConfigError(
                f"model.path: {file} asks for Python of its own (auto_map: {str(values['auto_map'])[:120]}), which is "
                "never run: if the architecture is one that transformers has itself, delete auto_map from that file; "
                "a tokenizer of its own has to be saved as tokenizer.json first"
            )


def load_tokenizer(folder: str | Path) -> Any:
    """Tokenizer of a Hugging Face folder, through transformers; local files only.

    Raises :class:`ConfigError` for a folder that brings code or that transformers cannot read.
    """
    from transformers import AutoTokenizer

    refuse_remote_code(folder)
    if not Path(folder).is_dir():
        raise ConfigError(f"model.path: {folder} is not a folder on this machine")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers do: KeyError, TypeError, Rust's own
        raise ConfigError(
            f"model.path: the tokenizer of {folder} does not load ({type(error).__name__}: {error})"
        ) from error
