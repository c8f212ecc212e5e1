"""Answers and references as the reward reads them: calls by the dialect's one reader (``megatron_rest.regions.read``).

The published reward has a reader of its own (one block, one strict JSON object a line, ``parameters`` only), which is
kept for parity: ``reward.accept_arguments=false``.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megatron_rest.regions import REFERENCE_LIMITS, TOOLRL, Dialect, ToolCall, ToolCallError, read_turn
from megatron_rest.regions.call_formats.json_objects import JsonCalls
from megatron_rest.regions.calls import (
    MAX_BLOCK_CHARACTERS,
    MAX_DEPTH,
    MAX_SHOWN_CHARACTERS,
    Limits,
    load_json,
    nesting_depth,
    refuse_constant,
)
from megatron_rest.token_region import TokenRegion

__all__ = [
    "MAX_BLOCK_CHARACTERS",
    "MAX_DEPTH",
    "Reference",
    "ReferenceAnswerError",
    "ToolCall",
    "ToolCallError",
    "answer_text",
    "canonical",
    "nesting_depth",
    "parse_tool_calls",
    "read_reference",
    "refuse_constant",
    "thought_end",
]

_END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text)\|>|<｜end▁of▁sentence｜>")
_OPENING = re.compile(r"<(?:think|tool_call|response)>")
_TAG = re.compile(r"</?tool_call>")


class ReferenceAnswerError(ValueError):
    """A reference answer cannot be read, or its dialect cannot write it: no answer could earn its reward."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference answer in ToolRL's tags, read."""

    thought: str | None
    calls: tuple[ToolCall, ...]
    response: str | None
    sections: tuple[str, ...]  # of tool_call and response, those it has, in this order
    is_closed: bool = True  # every section is

    @property
    def wants_calls(self) -> bool:
        return "tool_call" in self.sections


def answer_text(response_text: str) -> str:
    """Text before the first end-of-turn marker (of common families), stripped of white space."""
    return _END_OF_TURN.split(response_text, maxsplit=1)[0].strip()


def thought_end(text: str) -> int:
    """Where the thoughts that come before any other section are over (behind ``</think>``); 0 if there are none.

    The same left-to-right rule by which regions are labelled: inside a thought only its closing tag counts.
    """
    position = 0
    while (opened := _OPENING.search(text, position)) and opened.group() == "<think>":
        close = text.find("</think>", opened.end())
        if close < 0:
            return len(text)
        position = close + len("</think>")
    return position


_REFERENCE = replace(TOOLRL, name="reference", calls=JsonCalls("parameters", is_lenient=True))
_REFERENCE_WITHOUT_THOUGHT = replace(_REFERENCE, name="reference without thought", sections=_REFERENCE.sections[1:])


_UNCLOSED = "it opens <tool_call> and never closes it"


@lru_cache(maxsize=4096)
def read_reference(ground_truth: str) -> Reference:
    """A reference answer: what people write is read (OpenAI's wrapper, arguments as JSON text, none at all).

    Raises :class:`ReferenceAnswerError`.
    """
    turn = read_turn(ground_truth, dialect=_REFERENCE, limits=REFERENCE_LIMITS)
    if turn.thought is not None and not turn.is_thought_closed:
        turn = read_turn(ground_truth, dialect=_REFERENCE_WITHOUT_THOUGHT, limits=REFERENCE_LIMITS)
    if turn.errors or (turn.has_calls and not turn.is_closed):
        why = (
            turn.errors[0].replace("an empty section", "an empty <tool_call> section") if turn.is_closed else _UNCLOSED
        )
        raise ReferenceAnswerError(f"the reference answer cannot be parsed: {why}")
    bad = [call.name for call in turn.calls if not isinstance(call.name, str) or not call.name]
    if bad:
        raise ReferenceAnswerError(f"the reference answer cannot be parsed: the name of a call is {bad[0]!r}")
    sections = (("tool_call", turn.has_calls), ("response", turn.response is not None))
    there = tuple(name for name, is_there in sections if is_there)
    return Reference(turn.thought, turn.calls, turn.response, there, is_closed=turn.is_response_closed)


@lru_cache(maxsize=32)
def _without_thought(dialect: Dialect) -> Dialect:
    sections = tuple(section for section in dialect.sections if section.region is not TokenRegion.THINK)
    return replace(dialect, name=f"{dialect.name} without thought", sections=sections)


def parse_tool_calls(
    text: str, *, accept_arguments: bool = True, opaque_thought: bool = True, dialect: Dialect = TOOLRL
) -> tuple[ToolCall, ...]:
    """Calls of all call sections, in order.

    Args:
        text: an answer.
        accept_arguments: read calls as serving engines do: ``arguments`` or ``parameters``, one block a call or several
            calls a block.  False is the published reader: the first block, a line a call, ``parameters`` only.
        opaque_thought: look behind the thought only; False finds a tag that the thought merely mentions.
        dialect: how calls are written.

    Raises:
        ToolCallError: no call, an unclosed section, a block too large, anything that is no call in one.
    """
    if not accept_arguments:
        return _published_calls(text[thought_end(text) :] if opaque_thought else text)
    turn = read_turn(text, dialect=dialect if opaque_thought else _without_thought(dialect))
    if not turn.has_calls:
        raise ToolCallError("no <tool_call> ... </tool_call> block" if dialect is TOOLRL else "no tool call")
    if not turn.is_closed:
        raise ToolCallError("no <tool_call> ... </tool_call> block: it is never closed")
    if turn.errors:
        raise ToolCallError(turn.errors[0])
    return turn.calls


def _published_calls(body: str) -> tuple[ToolCall, ...]:
    _, opened, rest = body.partition("<tool_call>")
    if not opened or "</tool_call>" not in body:
        raise ToolCallError("no <tool_call> ... </tool_call> block")
    block = _TAG.split(rest, maxsplit=1)[0]  # a second opening tag ends the block, too
    if len(block) > MAX_BLOCK_CHARACTERS:
        raise ToolCallError(f"the block has {len(block)} characters, more than {MAX_BLOCK_CHARACTERS}")
    return tuple(_published_call(line, number) for number, line in enumerate(block.strip().split("\n")))


def _published_call(line: str, number: int) -> ToolCall:
    where = f"line {number} of the block ({line.strip()[:MAX_SHOWN_CHARACTERS]!r})"
    call = load_json(line, Limits())
    if not isinstance(call, dict):
        raise ToolCallError(f"{where} is a {type(call).__name__}, expected an object")
    missing = [key for key in ("name", "parameters") if key not in call]
    if missing:
        raise ToolCallError(f"{where} has no {' and no '.join(missing)}")
    if not isinstance(call["parameters"], dict):
        raise ToolCallError(f"{where}: parameters are a {type(call['parameters']).__name__}, expected an object")
    return ToolCall(name=call["name"], parameters=call["parameters"], raw=call)


def canonical(value: Any) -> Any:
    """JSON values with every text in NFC: canonically equivalent texts are the same text, and many tokenizers cannot
    write any other form."""
    if isinstance(value, str):
        return value if value.isascii() else unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [canonical(item) for item in value]
    if isinstance(value, dict):
        return {canonical(key): canonical(item) for key, item in value.items()}
    return value
