"""Calls as objects in whatever spelling people's data has: JSON, pretty-printed or in a list, or Python's dictionaries.

For data of the user's own, not for what a policy writes: ``load`` returns the object as it is, since data sets name a
call's parts in many ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rest.regions.call_formats.python import closing_bracket, parse_literal
from megatron_rest.regions.calls import (
    CallSpan,
    Limits,
    Schemas,
    ToolCall,
    ToolCallError,
    decoded,
    json_text,
    load_json,
    shown,
)

__all__ = ["LiteralCalls", "json_or_literal"]

# {"name": "f", "arguments": '{"note": "it's"}'}: JSON text in quotes that it holds itself, as Glaive's set has it
_QUOTED_ARGUMENTS = re.compile(r"""\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*'(.*)'\s*\}""", re.DOTALL)
_PYTHON = re.compile(r"'|\b(?:True|False|None)\b")


@dataclass(frozen=True, slots=True)
class LiteralCalls:
    """One object a call, alone or in lists.  ``raw`` of a call is the object; its other fields are not to be used."""

    glue: re.Pattern[bytes] = re.compile(rb"(?:[\s\[\],;]|<\|/tool_call\|>|<functioncall>)*")

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        position = start
        while (brace := text.find(b"{", position, end)) >= 0:
            position = closing_bracket(text, brace, end)
            yield CallSpan(brace, position, None)

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        value = json_or_literal(decoded(text[call.start : call.end]), limits)
        if not isinstance(value, dict):
            raise ToolCallError(f"{shown(repr(value))} is a {type(value).__name__}, expected an object")
        return ToolCall(name=None, parameters={}, raw=value)

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return json_text([{"name": name, "arguments": held} for name, held in calls])


def json_or_literal(text: str, limits: Limits) -> Any:
    """JSON, else a Python literal.  Raises :class:`ToolCallError` with what JSON has against it."""
    try:
        return load_json(text, limits)
    except ToolCallError as error:
        if found := _QUOTED_ARGUMENTS.fullmatch(text.strip()):
            return {"name": found[1], "arguments": load_json(found[2], limits)}
        if not _PYTHON.search(text):  # broken JSON is no Python
            raise
        try:
            return parse_literal(text, limits)
        except ToolCallError:
            raise error from None
