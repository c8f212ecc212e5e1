"""Tool calls in an answer: every ``<tool_call>`` block behind the thought, one or several JSON objects in each.

Covers Hermes / Qwen3 (a block per call, ``arguments``) and ToolRL (one block, a call a line, ``parameters``).  The text
comes from a policy, so it is hostile: sizes and nesting are bounded before a parser sees them, and nothing raises; what
cannot be read is a finding that an environment may show to the policy.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from megatron_rest.rewards.parsing import MAX_BLOCK_CHARACTERS, MAX_DEPTH, nesting_depth, refuse_constant

__all__ = ["Call", "ParsedCalls", "parse_calls"]

MAX_CALLS = 64  # of one answer

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: a name and JSON arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ParsedCalls:
    """Calls in order, and what was wrong with blocks that are none."""

    calls: tuple[Call, ...] = ()
    errors: tuple[str, ...] = ()


def parse_calls(text: str, *, starts_in_think: bool = False) -> ParsedCalls:
    """Calls of one answer.  ``starts_in_think``: the template opened the thought, so the text up to its end is one."""
    body = text
    if starts_in_think:
        _, closed, rest = text.partition("</think>")
        body = rest if closed else ""
    elif thought := _THOUGHT.match(text):
        body = text[thought.end() :]
    calls: list[Call] = []
    errors: list[str] = []
    for number, block in enumerate(_BLOCK.finditer(body), start=1):
        try:
            calls += _calls_of(block[1])
        except ValueError as error:
            errors.append(f"tool_call block {number}: {error}")
        if len(calls) > MAX_CALLS or number > MAX_CALLS:
            return ParsedCalls((), (f"more than {MAX_CALLS} calls in one answer",))
    return ParsedCalls(tuple(calls), tuple(errors))


def _calls_of(block: str) -> list[Call]:
    if len(block) > MAX_BLOCK_CHARACTERS:
        raise ValueError(f"{len(block)} characters, more than {MAX_BLOCK_CHARACTERS}")
    if nesting_depth(block) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    decoder = json.JSONDecoder(parse_constant=refuse_constant)
    calls: list[Call] = []
    position = 0
    while position < len(block):
        if block[position].isspace():
            position += 1
            continue
        value, position = decoder.raw_decode(block, position)
        calls += map(_call, value if isinstance(value, list) else [value])
    if not calls:
        raise ValueError("no call in it")
    return calls


def _call(value: Any) -> Call:
    if not isinstance(value, dict):
        raise ValueError(f"a call is a JSON object, got {type(value).__name__}")
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(name, str) or not name:
        raise ValueError('a call has a "name", a string')
    if not isinstance(arguments, dict):
        raise ValueError(f'call {name[:60]!r} has no "arguments" object')
    return Call(name, arguments)
