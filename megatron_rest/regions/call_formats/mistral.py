"""Mistral's calls behind ``[TOOL_CALLS]``: a JSON list (to v7), or ``name[ARGS]{...}`` each behind a tag (from v11)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rest.regions.call_formats.json_objects import JsonCalls, matching_bracket
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

__all__ = ["MistralCalls"]

_LIST = JsonCalls()
_NAMED = re.compile(rb"(?:\[TOOL_CALLS\])?+\s*+([^\s\[\]{},\"]++)\s*+(?:\[CALL_ID\][^\[{]*+)?+(?:\[ARGS\])?+\s*+(?=\{)")


@dataclass(frozen=True, slots=True)
class MistralCalls:
    """Reads both spellings; ``named`` says that ``name[ARGS]{...}`` is written."""

    named: bool = False
    glue: re.Pattern[bytes] = re.compile(rb"(?:[\s\[\],]|\[TOOL_CALLS\])*")

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        position = start
        while position < end:
            brace = text.find(b"{", position, end)
            named = _NAMED.search(text, position, end)
            if named and named.end() <= brace:
                position = matching_bracket(text, named.end(), end)
                yield CallSpan(named.start(), position, named.span(1), ((named.end(), position),))
            elif brace >= 0:
                call = next(_LIST.scan(text, brace, end))
                yield call
                position = call.end
            else:
                return

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        if text[call.start : call.start + 1] == b"{":
            return _LIST.load(text, call, limits, schemas)
        assert call.name is not None
        name = decoded(text[slice(*call.name)])
        value = load_json(decoded(text[slice(*call.arguments[0])]), limits)
        if not isinstance(value, dict):
            raise ToolCallError(f"{shown(name)}: the arguments are a {type(value).__name__}, expected an object")
        return ToolCall(name=name, parameters=value, raw={"name": name, "parameters": value})

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        if self.named:
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{json_text(arguments)}" for name, arguments in calls)
        return "[TOOL_CALLS] " + json_text([{"name": name, "arguments": held} for name, held in calls])
