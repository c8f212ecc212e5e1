"""A Hugging Face tokenizer folder as this package uses it: ``tokenizers`` and ``jinja2``, no ``transformers``.

``tests/data_tools/test_chat.py`` holds the ids equal to those of ``AutoTokenizer.apply_chat_template``.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import DataError, RowError
from data_tools.word_cache import WordEncoder, cuts_are_exact, separator
from megatron_rest.data import prompt_files
from megatron_rest.data.chat_template import STOCK, ChatTemplate, TemplateError, compiled_template
from megatron_rest.data.template_dialect import template_dialect, why_unfit
from megatron_rest.regions import TOOLRL, Dialect, answer_prefix
from megatron_rest.regions.calls import json_text

_INSTALL = "pip install 'megatron_rest[train]' (or pip install tokenizers jinja2)"


class ChatTokenizer:
    """Chat template and token ids of one tokenizer folder.

    ``dialect`` is how answers are written (its tags are text, whatever the vocabulary calls them); ``template`` is
    stock, append_only, a shipped one's name or a path, as ``model.chat_template``.
    """

    def __init__(self, folder: str | Path, *, dialect: Dialect = TOOLRL, template: str = STOCK) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise DataError(f"tokenizing needs the package tokenizers: {_INSTALL}") from error
        self.folder = Path(folder)
        self.dialect = dialect
        if not (self.folder / "tokenizer.json").is_file():
            raise DataError(
                f"--tokenizer: {folder} has no tokenizer.json: give a Hugging Face folder (fast tokenizer); of a "
                "name on the hub, `hf download NAME --local-dir DIR` makes one"
            )
        try:
            self.template_identity = prompt_files.template_identity(folder)
            self._template = ChatTemplate.of_folder(folder, template)
            differs = prompt_files.why_ids_differ(folder)
        except ValueError as error:
            raise DataError(f"--tokenizer: {error}") from error
        if differs:
            raise DataError(f"--tokenizer: {differs}")
        self.template_text = self._template.text
        try:
            self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # the Rust side raises nothing narrower
            raise DataError(f"--tokenizer: {self.folder}/tokenizer.json does not load: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        try:
            compiled_template(self._template.text)
        except ImportError as error:
            raise DataError(f"chat templates need the package jinja2: {_INSTALL}") from error
        except TemplateError as error:
            raise DataError(f"--tokenizer: {error}") from error
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
    def template_dialect(self) -> Dialect | None:
        """The dialect in which the chat template shows tools and calls; None where it shows none that is known."""
        return template_dialect(self._template)

    @cached_property
    def why_tools_do_not_fit(self) -> str:
        """Why rows with tools cannot be asked in the dialect by this template; empty if they can."""
        return "" if self.dialect is TOOLRL else why_unfit(self._template, self.dialect)

    @cached_property
    def generation_prompt(self) -> str:
        """What the template writes for the model to go on from."""
        return self._template.generation_prompt()

    def answer_prefix(self, prompt: str) -> str:
        """What a rendered prompt has written of the answer already: an opened thought, or an empty one."""
        return answer_prefix(prompt[-64:].encode("utf-8", "surrogatepass"), self.dialect)

    @cached_property
    def end_of_turn(self) -> str:
        """The token a model ends its turn with: what the chat template writes behind an answer, else ``eos_token``."""
        eos = prompt_files.special_tokens(self.folder).get("eos_token")
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        for token in (self.dialect.turn_end, self._template.end_of_turn(added), eos):
            if token and self._tokenizer.token_to_id(token) is not None:
                return str(token)
        raise DataError(
            f"--tokenizer: {self.folder} names no end-of-turn token: set eos_token in tokenizer_config.json"
        )

    @cached_property
    def end_of_calls_id(self) -> int:
        """Id that ends a turn which makes calls: the same, but for dialects that have one of their own."""
        own = self._tokenizer.token_to_id(self.dialect.call_end) if self.dialect.call_end else None
        return self.end_of_turn_id if own is None else int(own)

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
        """Special tokens: in the text of a message they would change the structure of the conversation.

        Tags of thoughts, calls and answers are text, also where a vocabulary calls them special.
        """
        added = self._tokenizer.get_added_tokens_decoder().values()
        text = {*TOOLRL.tags(), *self.dialect.tags()}
        return tuple(sorted(token.content for token in added if token.special and token.content not in text))

    @cached_property
    def _control_beginnings(self) -> set[str]:
        """Llama 3 has 256 control tokens, which begin alike."""
        return {token[:2] for token in self.control_tokens}

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt as text, generation prompt included."""
        for message in messages:
            self.check_text(str(message.get("content") or ""))
        try:
            return self._render(messages, tools)
        except TemplateError as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        try:
            return self._template.render(messages, tools, add_generation_prompt=True)
        except TemplateError:
            told = [_with_text_arguments(message) for message in messages]
            if told == list(messages):
                raise
            return self._template.render(told, tools, add_generation_prompt=True)  # DeepSeek's wants JSON text

    def check_text(self, text: str, written_in: Dialect | None = None) -> None:
        """Refuse text that holds control tokens; an answer may hold those of the dialect it is ``written_in``."""
        if not any(beginning in text for beginning in self._control_beginnings):
            return
        allowed = written_in.control_tokens if written_in is not None else ()
        for token in self.control_tokens:
            if token in text and token not in allowed:
                raise RowError(f"the text contains the control token {token}: it would start or end a turn")

    def normalised(self, text: str) -> str:
        """The text that its ids stand for: vocabularies of the Qwen family compose accents (NFC) before they cut."""
        normalizer = self._spec.get("normalizer") or {}
        kinds = {part.get("type") for part in normalizer.get("normalizers", [normalizer])}
        return unicodedata.normalize("NFC", text) if kinds == {"NFC"} else text

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


def _with_text_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of calls as JSON text, as OpenAI has them."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    told = [
        {**call, "function": {**call["function"], "arguments": json_text(call["function"]["arguments"])}}
        for call in calls
    ]
    return {**message, "tool_calls": told}
