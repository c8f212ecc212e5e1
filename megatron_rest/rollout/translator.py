"""Between token ids and the text of a conversation, for one tokenizer and its chat template.

An answer becomes text from the bytes of its sampled tokens.  What an environment says becomes tokens in one way only:
the template renders it behind a finished turn, and that suffix is tokenised.  The policy's own tokens are never
rendered again, so the conversation grows at its end and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rest.regions import token_bytes_table
from megatron_rest.rollout.environments.base import Message
from megatron_rest.rollout.environments.calls import ParsedCalls, parse_calls

__all__ = ["ChatTranslator"]

_BEFORE = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


class ChatTranslator:
    """Text of answers, tokens of messages.

    Args:
        tokenizer: of transformers, byte-level, with a chat template and an ``eos_token`` that ends a turn.
        starts_in_think: the generation prompt itself opens the thought.

    Raises ValueError for a template that does not end a turn with ``eos_token`` or rewrites a turn when messages
    follow.
    """

    def __init__(self, tokenizer: Any, *, starts_in_think: bool = False) -> None:
        self._tokenizer = tokenizer
        self._starts_in_think = starts_in_think
        self._bytes = token_bytes_table(tokenizer)
        self._eos = str(tokenizer.eos_token)
        # Not all_special_tokens: that leaves out <|im_start|> and whatever else has no role of its own.
        self._control_tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        before = self.template(_BEFORE)
        head, eos, tail = before.rpartition(self._eos)
        if not eos or not head.endswith("a") or tail.strip():
            raise ValueError(
                f"the chat template does not end an assistant's turn with eos_token {self._eos!r}: it renders "
                f"{before[-40:]!r}"
            )
        self._before, self._behind_turn = before, tail  # tail: a newline, usually, that the policy does not sample

    def template(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text."""
        text = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return str(text)

    def text(self, token_ids: np.ndarray) -> str:
        """An answer without its end-of-turn marker."""
        text = b"".join(self._bytes[i] for i in token_ids).decode("utf-8", errors="replace")
        return text.removesuffix(self._eos)

    def calls(self, text: str) -> ParsedCalls:
        """Tool calls of an answer."""
        return parse_calls(text, starts_in_think=self._starts_in_think)

    def suffix(self, messages: Sequence[Message]) -> str:
        """What follows the end-of-turn token of an answer: the messages and the next generation prompt."""
        said = [{"role": m.role, "content": m.content} for m in messages]
        whole = self.template([*_BEFORE, *said], add_generation_prompt=True)
        if not whole.startswith(self._before):
            raise ValueError(f"the chat template renders a turn differently when {messages[0].role} messages follow it")
        return self._behind_turn + whole[len(self._before) :]

    def encode(self, text: str) -> np.ndarray:
        """int32 ids, nothing added; special tokens in the text of a template are single ids."""
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def render(self, messages: Sequence[Message]) -> np.ndarray:
        """int32: :meth:`suffix` as tokens.  Control tokens inside a message's content are defused first."""
        return self.encode(self.suffix([Message(role=m.role, content=self._defused(m.content)) for m in messages]))

    def _defused(self, text: str) -> str:
        """A tool must not be able to end its own turn and speak as the user or the policy."""
        for token in self._control_tokens:
            text = text.replace(token, token[:1] + " " + token[1:])
        return text
