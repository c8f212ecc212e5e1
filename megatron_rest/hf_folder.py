"""A Hugging Face folder is data: configuration, tokenizer, safetensors.  Python that comes with one is never run.

Megatron builds the model from numbers in ``config.json`` and vLLM from a class of its own, so nothing here ever needs
``trust_remote_code``, and there is no option for it.  A folder that asks for it is refused by name instead of being
loaded as something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rest.config import ConfigError
from megatron_rest.data import prompt_files
from megatron_rest.data.chat_template import STOCK, ChatTemplate
from megatron_rest.regions import TOOLRL, Dialect

__all__ = ["load_tokenizer", "refuse_remote_code", "stop_token_ids"]

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

    ``tokenizer.json`` decides, as it did when the data was prepared.  The class that ``tokenizer_config.json`` names
    builds pieces of its own instead in transformers 5: GPT2Tokenizer (SmolLM2) has no rule for digits any more,
    LlamaTokenizerFast (DeepSeek) loses the spaces.

    Raises :class:`ConfigError` for a folder that brings code or that transformers cannot read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    refuse_remote_code(folder)
    if not Path(folder).is_dir():
        raise ConfigError(f"model.path: {folder} is not a folder on this machine")
    with _of_the_folder():
        differs = prompt_files.why_ids_differ(folder)
    if differs:
        raise ConfigError(f"model.path: {differs}")
    reads = PreTrainedTokenizerFast if (Path(folder) / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = reads.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers do: KeyError, TypeError, Rust's own
        raise ConfigError(
            f"model.path: the tokenizer of {folder} does not load ({type(error).__name__}: {error})"
        ) from error
    with _of_the_folder():
        rows = prompt_files.json_object(Path(folder) / "config.json").get("vocab_size")
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if isinstance(rows, int) and size > rows:
        raise ConfigError(
            f"model.path: {folder} has tokens up to id {size - 1}, but rows for {rows} (vocab_size in config.json): "
            "add rows with resize_token_embeddings of transformers, or take the tokenizer that belongs to the model"
        )
    return tokenizer


def stop_token_ids(
    folder: str | Path, *, dialect: Dialect = TOOLRL, chat_template: str = STOCK, end_of_turn: str = ""
) -> list[int]:
    """Ids that end a turn, the template's own end of turn first.

    They are what the chat template writes behind an answer (and the dialect's own ends, where it has some), the
    ``eos_token``, and every id of ``generation_config.json`` (of ``config.json`` where there is none): a base model's
    ``eos_token`` ends documents, while its template ends turns.

    Args:
        folder: HF folder with tokenizer.json.
        dialect: how the model writes.
        chat_template: as ``model.chat_template``.
        end_of_turn: the token that ends the answers of prepared prompts (their manifest names it); goes first.

    Raises :class:`ConfigError` if there is none, so that no answer would ever end, or if ``end_of_turn`` is no token.
    """
    with _of_the_folder():
        spec = prompt_files.tokenizer_spec(folder)
        eos = prompt_files.special_tokens(folder).get("eos_token")
        ends = _configured_ends(Path(folder))
    vocab = spec["model"].get("vocab")
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    ids |= added
    try:
        from_template = ChatTemplate.of_folder(folder, chat_template).end_of_turn(list(added))
    except ValueError as error:
        if chat_template != STOCK:
            raise ConfigError(f"model.chat_template: {error}") from error
        from_template = ""  # a folder without a template: what prepared prompts say, and eos_token
    if end_of_turn and end_of_turn not in ids:
        raise ConfigError(
            f"model.path: answers of the prepared prompts end with {end_of_turn!r}, which is no token of {folder}: "
            "convert the data again with --tokenizer of this folder"
        )
    names = (end_of_turn, dialect.turn_end, from_template, dialect.call_end, eos)
    found = [ids[name] for name in names if name and name in ids] + ends
    if not found:
        raise ConfigError(
            f"model.path: {folder} names no token that ends a turn (neither its chat template nor eos_token nor "
            "generation_config.json), so no answer would ever end"
        )
    return list(dict.fromkeys(found))


def _configured_ends(folder: Path) -> list[int]:
    """``eos_token_id`` of generation_config.json, of config.json where there is none: an id or a list of ids."""
    generation = folder / "generation_config.json"
    path = generation if generation.is_file() else folder / "config.json"
    ends = prompt_files.json_object(path).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id of {path} is {ends!r}, expected a token id or a list of them")
    return ids


@contextmanager
def _of_the_folder() -> Iterator[None]:
    """What is wrong with its files is the configuration's: they are what ``model.path`` names."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from error
