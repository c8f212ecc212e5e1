"""gpt-oss' calls: a message whose header names the function as its recipient; the body is the arguments.

    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"city": "Bern"}<|call|>

The recipient may also stand before the channel.  ``<|call|>`` ends the turn, so a turn holds one call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

__all__ = ["HEADER", "HarmonyCalls"]

HEADER = re.compile(
    rb"(?:<\|start\|>assistant)?+(?: ?to=(?P<before>[^<\s]++))?+"
    rb"<\|channel\|>(?P<channel>\w*+)(?: to=(?P<behind>[^<\s]++))?+\s*+(?:<\|constrain\|>)?+\s*+\w*+\s*+<\|message\|>"
)
_PREFIX = "functions."


@dataclass(frozen=True, slots=True)
class HarmonyCalls:
    """The segment handed in is one whole message, from its header to the end of its body."""

    glue: re.Pattern[bytes] = re.compile(rb"\s*")

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        header = HEADER.match(text, start, end)
        if header is None:
            return
        group = "behind" if header["behind"] else "before"
        first, last = header.span(group)
        if header[group].startswith(_PREFIX.encode()):
            first += len(_PREFIX)
        yield CallSpan(start, end, (first, last), ((header.end(), end),) if header.end() < end else ())

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        assert call.name is not None
        name = decoded(text[slice(*call.name)])
        if not text[: call.name[0]].endswith(_PREFIX.encode()) or not name:
            raise ToolCallError(f"the recipient {shown(name)} is no function")
        value = load_json(decoded(text[slice(*call.arguments[0])]) if call.arguments else "", limits)
        if not isinstance(value, dict):
            raise ToolCallError(f"the arguments of {name[:60]!r} are a {type(value).__name__}, expected an object")
        return ToolCall(name=name, parameters=value, raw={"name": name, "parameters": value})

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        if len(calls) != 1:
            raise ToolCallError(f"harmony ends a turn at its first call, and the answer makes {len(calls)}")
        [(name, arguments)] = calls
        return f"<|start|>assistant<|channel|>commentary to={_PREFIX}{name} <|constrain|>json<|message|>" + json_text(
            arguments
        )
