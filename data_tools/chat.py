"""A Hugging Face tokenizer folder as this package uses it: ``tokenizers`` and ``jinja2``, no ``transformers``.

``tests/data_tools/test_chat.py`` holds the ids equal to those of ``AutoTokenizer.apply_chat_template``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import DataError, RowError
from data_tools.word_cache import WordEncoder, cuts_are_exact, separator
from megatron_rest.data import prompt_files

_INSTALL = "pip install 'megatron_rest[train]' (or pip install tokenizers jinja2)"


class ChatTokenizer:
    """Chat template and token ids of one tokenizer folder."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise DataError(f"tokenizing needs the package tokenizers: {_INSTALL}") from error
        self.folder = Path(folder)
        if not (self.folder / "tokenizer.json").is_file():
            raise DataError(f"--tokenizer: {folder} has no tokenizer.json: give a Hugging Face folder (fast tokenizer)")
        try:
            self.template_text = prompt_files.chat_template(folder)
            self.template_identity = prompt_files.template_identity(folder)
            self._config = prompt_files.tokenizer_config(folder)
        except ValueError as error:
            raise DataError(f"--tokenizer: {error}") from error
        try:
            self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # the Rust side raises nothing narrower
            raise DataError(f"--tokenizer: {self.folder}/tokenizer.json does not load: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = _compile(self.template_text)
        self._words = WordEncoder(self._tokenizer, exact=cuts_are_exact(self._spec), separator=separator(self._spec))

    @cached_property
    def identity(self) -> str:
        """Hash of what decides token ids; of a large vocabulary it takes a second, which worker processes spare."""
        try:
            return prompt_files.tokenizer_identity(self.folder)
        except ValueError as error:
            raise DataError(f"--tokenizer: {error}") from error

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return dict(json.loads(self._tokenizer.to_str()))

    @cached_property
    def end_of_turn(self) -> str:
        """The token a model ends its turn with: ``<|im_end|>`` where the vocabulary has it, else ``eos_token``."""
        eos = self._config.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        for token in ("<|im_end|>", eos):
            if token and self._tokenizer.token_to_id(token) is not None:
                return str(token)
        raise DataError(
            f"--tokenizer: {self.folder} names no end-of-turn token: set eos_token in tokenizer_config.json"
        )

    @cached_property
    def end_of_turn_id(self) -> int:
        """Its id."""
        return self._tokenizer.get_vocab(with_added_tokens=True)[self.end_of_turn]

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Special tokens: in the text of a message they would change the structure of the conversation."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(sorted(token.content for token in added if token.special))

    def render(self, messages: Sequence[dict[str, str]], tools: list[Any] | None = None) -> str:
        """The prompt as text, generation prompt included."""
        for message in messages:
            self.check_text(message["content"])
        special = {
            k: v.get("content") if isinstance(v, dict) else v for k, v in self._config.items() if k.endswith("_token")
        }
        try:
            return str(
                self._template.render(messages=list(messages), tools=tools, add_generation_prompt=True, **special)
            )
        except Exception as error:  # a template is a program: whatever it raises, this row is refused
            raise RowError(f"the chat template refuses the conversation: {error}") from error

    def check_text(self, text: str) -> None:
        """Refuse text that holds control tokens."""
        for token in self.control_tokens:
            if token in text:
                raise RowError(f"the text contains the control token {token}: it would start or end a turn")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 token ids, nothing added."""
        return self._words.encode(texts)

    def token_starts(self, ids: np.ndarray, text: str) -> np.ndarray | None:
        """int32 [len(ids) + 1]: byte of ``text`` where each token starts, then its end; None if not byte-exact."""
        starts = np.zeros(len(ids) + 1, dtype=np.int32)
        np.cumsum(self._token_bytes[ids], out=starts[1:])
        return starts if starts[-1] == len(text.encode()) else None

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        """Bytes each id stands for; only the byte-level alphabet (one character a byte) tells them exactly."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = {i: t.content for i, t in self._tokenizer.get_added_tokens_decoder().items()}
        sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        if (self._spec.get("decoder") or {}).get("type") != "ByteLevel":
            return sizes - 1
        for token, index in vocabulary.items():
            sizes[index] = len(added[index].encode()) if index in added else len(token)
        return sizes

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _compile(template: str) -> Any:
    """Compile a chat template as ``transformers`` does (sandboxed)."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise DataError(f"chat templates need the package jinja2: {_INSTALL}") from error

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime(2000, 1, 1).strftime(pattern)  # same bytes every day
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise DataError(f"--tokenizer: the chat template does not compile: {error}") from error
