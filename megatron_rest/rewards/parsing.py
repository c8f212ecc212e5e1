"""Tool calls out of text: strict JSON, one call a line, with limits; every failure is a :class:`ToolCallError`.

The text comes from a model that is being optimised against the parser, so it is treated as hostile: size and nesting
are bounded before ``json.loads`` sees it, and NaN and Infinity (which are not JSON) are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

__all__ = [
    "MAX_BLOCK_CHARACTERS",
    "MAX_DEPTH",
    "ToolCall",
    "ToolCallError",
    "answer_text",
    "nesting_depth",
    "parse_tool_calls",
    "refuse_constant",
    "thought_end",
]

MAX_BLOCK_CHARACTERS = 1 << 16  # a response of 2,048 tokens has about 8,000
MAX_DEPTH = 32  # far below Python's recursion limit, far above real arguments
MAX_SHOWN_CHARACTERS = 60  # of a bad line, in messages

_END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text)\|>")
_OPENING = re.compile(r"<(?:think|tool_call|response)>")
_TAG = re.compile(r"</?tool_call>")
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class ToolCallError(ValueError):
    """The tool-call block of a text cannot be read; the message says which line and why."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One parsed call.  ``raw`` is the whole JSON object with its arguments under ``parameters``."""

    name: Any
    parameters: dict[str, Any]
    raw: dict[str, Any]


def answer_text(response_text: str) -> str:
    """Text before the first end-of-turn marker (Qwen's and Llama's), stripped of white space."""
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


def parse_tool_calls(text: str, *, accept_arguments: bool = True, opaque_thought: bool = True) -> tuple[ToolCall, ...]:
    """Calls of the first tool_call block, in order.

    Args:
        text: an answer, without its end-of-turn marker.
        accept_arguments: read ``arguments`` where there are no ``parameters``.
        opaque_thought: look behind the thought only; False finds a tag that the thought merely mentions.

    Raises:
        ToolCallError: no block, a block too large, a line that is not one JSON object with a name and an object of
            parameters.
    """
    body = text[thought_end(text) :] if opaque_thought else text
    _, opened, rest = body.partition("<tool_call>")
    if not opened or "</tool_call>" not in body:
        raise ToolCallError("no <tool_call> ... </tool_call> block")
    block = _TAG.split(rest, maxsplit=1)[0]  # the published code lets a second opening tag end the block, too
    if len(block) > MAX_BLOCK_CHARACTERS:
        raise ToolCallError(f"the block has {len(block)} characters, more than {MAX_BLOCK_CHARACTERS}")
    return tuple(_parse_line(line, number, accept_arguments) for number, line in enumerate(block.strip().split("\n")))


def _parse_line(line: str, number: int, accept_arguments: bool) -> ToolCall:
    where = f"line {number} of the block ({line.strip()[:MAX_SHOWN_CHARACTERS]!r})"
    if nesting_depth(line) > MAX_DEPTH:
        raise ToolCallError(f"{where} is nested deeper than {MAX_DEPTH}")
    try:
        call = json.loads(line, parse_constant=refuse_constant)
    except ValueError as error:
        raise ToolCallError(f"{where} is not JSON: {error}") from None
    if not isinstance(call, dict):
        raise ToolCallError(f"{where} is a {type(call).__name__}, expected an object")
    if accept_arguments and "parameters" not in call and "arguments" in call:
        call = {("parameters" if key == "arguments" else key): value for key, value in call.items()}
    missing = [key for key in ("name", "parameters") if key not in call]
    if missing:
        raise ToolCallError(f"{where} has no {' and no '.join(missing)}")
    if not isinstance(call["parameters"], dict):
        raise ToolCallError(f"{where}: parameters are a {type(call['parameters']).__name__}, expected an object")
    return ToolCall(name=call["name"], parameters=call["parameters"], raw=call)


def nesting_depth(line: str) -> int:
    """Deepest nesting of brackets outside strings."""
    depth = deepest = 0
    for character in _STRING.sub("", line):
        if character in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "}]":
            depth -= 1
    return deepest


def refuse_constant(name: str) -> NoReturn:
    """For ``parse_constant``: NaN and Infinity are not JSON."""
    raise ValueError(f"{name} is not JSON")
