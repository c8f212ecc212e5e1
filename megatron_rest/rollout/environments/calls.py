"""Tool calls in an answer, for environments: the dialect's reading (``megatron_rest.regions.read``), errors included.

The text comes from a policy, so it is hostile: sizes and nesting are bounded before a parser sees them, and nothing
raises; what cannot be read is a finding that an environment may show to the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_rest.regions import TOOLRL, Dialect, Schemas, read_turn

__all__ = ["Call", "ParsedCalls", "parse_calls"]


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


def parse_calls(
    text: str, *, starts_in_think: bool = False, dialect: Dialect = TOOLRL, schemas: Schemas | None = None
) -> ParsedCalls:
    """Calls of one answer.  ``starts_in_think``: the template opened the thought, so the text up to its end is one.

    The default reads ``<tool_call>`` blocks of JSON, one call a block (Hermes, Qwen) and several (ToolRL) alike.
    """
    turn = read_turn(text, dialect=dialect, starts_in_think=starts_in_think, schemas=schemas or {})
    calls = [Call(call.name, call.parameters) for call in turn.calls if isinstance(call.name, str) and call.name]
    nameless = [f"the name of a call is {call.name!r}, not a string" for call in turn.calls[len(calls) :][:1]]
    return ParsedCalls(tuple(calls), (*turn.errors, *nameless))
