"""Calls whose name stands in a tag or behind a label, and whose arguments are one object behind it.

    <|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"city": "Bern"}<|tool_call_end|>      Kimi K2
    <function=f>{"city": "Bern"}</function>                                                            Llama 3.1
    ✿FUNCTION✿: f                                                                                      Qwen-Agent
    ✿ARGS✿: {"city": "Bern"}
    Action: f                                                                                          ReAct
    Action Input: {"city": "Bern"}

For data of the user's own, as :mod:`~megatron_rest.regions.call_formats.literals`: arguments may be Python's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rest.regions.call_formats.literals import json_or_literal
from megatron_rest.regions.calls import CallSpan, Limits, Schemas, ToolCall, ToolCallError, decoded, json_text, shown

__all__ = ["NamedCalls"]


@dataclass(frozen=True, slots=True)
class NamedCalls:
    """``opening`` is everything before the arguments, its first group the name; ``closing`` what must follow them
    (None: the next opening, or the end); ``form`` how a call is written, for its name and its arguments."""

    opening: re.Pattern[bytes]
    closing: bytes | None
    form: str
    glue: re.Pattern[bytes] = re.compile(rb"\s*")

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        position = start
        while opening := self.opening.search(text, position, end):
            if self.closing is None:
                following = self.opening.search(text, opening.end(), end)
                stop = position = following.start() if following else end
            else:
                closing = text.find(self.closing, opening.end(), end)
                stop = end if closing < 0 else closing
                position = end if closing < 0 else closing + len(self.closing)
            yield CallSpan(opening.start(), position, opening.span(1), ((opening.end(), stop),))

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        assert call.name is not None
        name, arguments = decoded(text[slice(*call.name)]).strip(), decoded(text[slice(*call.arguments[0])])
        if self.closing is not None and not text[: call.end].endswith(self.closing):
            raise ToolCallError(f"the call of {name[:60]!r} is never closed")
        value = json_or_literal(arguments.strip(), limits)
        if not name or not isinstance(value, dict):
            raise ToolCallError(f"{shown(name)} with {shown(arguments)} is no name with an object of arguments")
        return ToolCall(name=name, parameters=value, raw={"name": name, "parameters": value})

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "\n".join(self.form % (name, json_text(arguments)) for name, arguments in calls)
