"""Between token ids and the text of a conversation, for one tokenizer and its chat template.

An answer becomes text from the bytes of its sampled tokens.  What an environment says becomes tokens in one way only:
the template renders it behind a finished turn, and that suffix is tokenised.  The policy's own tokens are never
rendered again, so the conversation grows at its end and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rest.data.chat_template import PROBE_TOOLS
from megatron_rest.regions import TOOLRL, Schemas, answer_prefix, token_bytes_table
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.environments.base import Message
from megatron_rest.rollout.environments.calls import ParsedCalls, parse_calls

__all__ = ["ChatTranslator"]

_BEFORE = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


class ChatTranslator:
    """Text of answers, tokens of messages.

    Args:
        tokenizer: of transformers, byte-level, with a chat template that ends a turn with a token of its own.
        chat: which template and dialect; None = the tokenizer's template, ToolRL's tags (which read Hermes' form, too).
        stop_token_ids: tokens that end a turn beside the template's: no part of an answer's text.

    Raises ValueError for a template that ends a turn with no token or rewrites a turn when messages follow.
    """

    def __init__(self, tokenizer: Any, *, chat: ChatSettings | None = None, stop_token_ids: Sequence[int] = ()) -> None:
        chat = chat or ChatSettings()
        self._tokenizer = tokenizer
        self._dialect = chat.reads
        self._template = chat.template(tokenizer)
        # Prompts in a model's own dialect were rendered with tools, and some templates then write later turns, too,
        # in another way; which tools makes no difference behind the first turn.
        self._tools = None if self._dialect is TOOLRL else PROBE_TOOLS
        self._bytes = token_bytes_table(tokenizer)
        added = tokenizer.added_tokens_decoder
        # Not all_special_tokens: that leaves out <|im_start|> and whatever else has no role of its own.
        self._control_tokens = [t.content for t in added.values() if t.special]
        self.end = self._template.end_of_turn([t.content for t in added.values()])
        """The token with which the template ends a turn (of GLM's that of the next user's)."""
        self._ends = {self.end, str(tokenizer.eos_token), self._dialect.call_end, self._dialect.turn_end} - {""}
        self._ends |= {added[i].content for i in stop_token_ids if i in added}
        before = self.template(_BEFORE)
        head, end, tail = before.rpartition(self.end) if self.end else (before, "", "")
        # GLM's turns end where another's begins: the policy samples what the template writes in front of that.
        self._ends_with_the_next = bool(self.end) and before.endswith("a")
        if self._ends_with_the_next:
            tail = ""
        elif not end or not head.endswith("a") or tail.strip():
            raise ValueError(
                f"the chat template does not end an assistant's turn with eos_token {tokenizer.eos_token!r} or any "
                f"other token: it renders {before[-40:]!r}"
            )
        self._before, self._behind_turn = before, tail  # tail: a newline, usually, that the policy does not sample
        prompt = self._template.generation_prompt()
        self.prefix = answer_prefix(prompt.encode(), self._dialect)
        """What the generation prompt has written of an answer: an opened thought, or an empty one."""

    def template(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text."""
        return self._template.render(messages, self._tools, add_generation_prompt=add_generation_prompt)

    def text(self, token_ids: np.ndarray) -> str:
        """An answer, what the generation prompt wrote of it included, without its end-of-turn marker."""
        text = b"".join(self._bytes[i] for i in token_ids).decode("utf-8", errors="replace")
        end = next((end for end in self._ends if end and text.endswith(end)), "")
        return self.prefix + text.removesuffix(end)

    def calls(self, text: str, schemas: Schemas | None = None) -> ParsedCalls:
        """Tool calls of an answer as :meth:`text` gives it; ``schemas`` of the prompt's tools."""
        return parse_calls(text, dialect=self._dialect, schemas=schemas)

    def end_and_suffix(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The token that ends an answer which ``messages`` follow; then these and the next generation prompt."""
        said = [{"role": m.role, "content": m.content} for m in messages]
        whole = self.template([*_BEFORE, *said], add_generation_prompt=True)
        if not whole.startswith(self._before):
            raise ValueError(f"the chat template renders a turn differently when {messages[0].role} messages follow it")
        rest = self._behind_turn + whole[len(self._before) :]
        if not self._ends_with_the_next:
            return self.end, rest
        end = max((end for end in self._ends if rest.startswith(end)), key=len, default="")
        if not end:
            raise ValueError(
                f"the chat template ends a turn that {messages[0].role} messages follow with no token at which engines "
                f"stop: it renders {rest[:40]!r}"
            )
        return end, rest.removeprefix(end)

    def encode(self, text: str) -> np.ndarray:
        """int32 ids, nothing added; special tokens in the text of a template are single ids."""
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def render(self, messages: Sequence[Message]) -> np.ndarray:
        """int32: what follows an answer's end of turn.  Control tokens inside a message's content are defused first.

        It is cut into tokens behind the end of turn, as in the conversation: some tokens take the spaces that follow.
        """
        said = [Message(role=m.role, content=self._defused(m.content)) for m in messages]
        end, suffix = self.end_and_suffix(said)
        return self.encode(end + suffix)[len(self.encode(end)) :]

    def _defused(self, text: str) -> str:
        """A tool must not be able to end its own turn and speak as the user or the policy."""
        for token in self._control_tokens:
            text = text.replace(token, token[:1] + " " + token[1:])
        return text
