"""Calls as JSON objects: ``{"name": "f", "arguments": {...}}``, one or several, alone or in a list.

The scan is no parser: strings and brackets with their depth, so it works on truncated and on broken JSON.  A *call
object* is an object with nothing but arrays around it.  In it, at its own depth, the value of the name key is a name
and the value of an arguments key is arguments, in any order; the same keys deeper down are data.

Two rules keep one broken call from swallowing the next: a string ends at a raw newline (JSON forbids one inside), and a
``{`` where a call object must have a key starts a new call.
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
    Span,
    ToolCall,
    ToolCallError,
    decoded,
    json_text,
    load_json,
    shown,
)

__all__ = ["JsonCalls", "call_of", "matching_bracket"]

_STRING = rb'"(?:[^"\\\n]++|\\[^\n])*+("?)'  # group: the closing quote, empty if there is none
_IN_CALL = re.compile(
    rb"\s*+(" + _STRING + rb"|[{}\[\]:,]|[^\s{}\[\]:,\"]++)"
)  # the last: a number, true, null or junk
_BRACKETS = re.compile(_STRING + rb"|[{}\[\]]")
_FLAT = re.compile(rb"[{\[](?:[^{}\[\]\"]++|" + _STRING + rb")*+[}\]]")
_USUAL = re.compile(
    rb'\{\s*+"name"\s*+:\s*+"((?:[^"\\\n]++|\\[^\n])*+)"\s*+,\s*+"(?:arguments|parameters)"\s*+:\s*+(?=[{\[])'
)
_CLOSING = re.compile(rb"\s*+\}")
_QUOTE, _COLON, _COMMA, _OPEN, _CLOSE = b'":,{}'
_ARGUMENTS_KEYS = (b"arguments", b"parameters")


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """Calls as JSON objects.

    ``opening``, ``separator`` and ``closing`` say how they are written; read is what JSON allows.  ``is_lenient``, for
    references that people wrote: OpenAI's wrapper, arguments as JSON text, and calls without arguments are read, too.
    """

    arguments_key: str = "arguments"
    opening: str = "<tool_call>\n"
    separator: str = "\n</tool_call>\n<tool_call>\n"
    closing: str = "\n</tool_call>"
    glue: re.Pattern[bytes] = re.compile(rb"[\s\[\],]*")
    is_lenient: bool = False

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        position = start
        while (brace := text.find(b"{", position, end)) >= 0:
            call = _scan_object(text, brace, end)
            yield call
            position = call.end

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        value = load_json(decoded(text[call.start : call.end]), limits)
        return call_of(_unwrapped(value, limits) if self.is_lenient else value)

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        objects = [json_text({"name": name, self.arguments_key: arguments}) for name, arguments in calls]
        return self.opening + self.separator.join(objects) + self.closing


def call_of(value: Any) -> ToolCall:
    """A call of its JSON value, arguments under ``parameters`` or ``arguments``."""
    if not isinstance(value, dict):
        raise ToolCallError(f"{shown(repr(value))} is a {type(value).__name__}, expected an object")
    if "parameters" not in value and "arguments" in value:
        value = {("parameters" if key == "arguments" else key): held for key, held in value.items()}
    missing = [key for key in ("name", "parameters") if key not in value]
    if missing:
        raise ToolCallError(f"the call {json_text(value)[:60]!r} has no {' and no '.join(missing)}")
    if not isinstance(value["parameters"], dict):
        kind = type(value["parameters"]).__name__
        raise ToolCallError(f"the call {json_text(value)[:60]!r}: parameters are a {kind}, expected an object")
    return ToolCall(name=value["name"], parameters=value["parameters"], raw=value)


def _unwrapped(value: Any, limits: Limits) -> Any:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return value
    arguments = value.get("parameters")
    arguments = value.get("arguments") if arguments is None else arguments
    if isinstance(arguments, str):
        arguments = load_json(arguments or "{}", limits)
    others = {key: held for key, held in value.items() if key not in ("parameters", "arguments")}
    return {**others, "parameters": {} if arguments is None else arguments}


def _scan_object(text: bytes, brace: int, end: int) -> CallSpan:
    """A call object from its ``{`` to behind its ``}``, to a new call, or to the end."""
    if usual := _USUAL.match(text, brace, end):  # what nearly all are: the loop below says the same of it
        behind = matching_bracket(text, usual.end(), end)
        if closing := _CLOSING.match(text, behind, end):
            return CallSpan(brace, closing.end(), usual.span(1), ((usual.end(), behind),))
    name: Span | None = None
    arguments: list[Span] = []
    key, is_value, position = b"", False, brace + 1
    while token := _IN_CALL.match(text, position, end):
        start, position = token.span(1)
        first, closing_quote = text[start], token.group(2)
        if first == _CLOSE:
            break
        if first == _OPEN and not is_value:  # no key can start so: the call before was never closed
            position = start
            break
        if first == _COLON:
            is_value = True
        elif first == _COMMA:
            key, is_value = b"", False
        elif not is_value:
            key = text[start + 1 : position - 1] if closing_quote else b""
        else:
            if first in b"{[":
                position = matching_bracket(text, start, end)
            if key == b"name" and first == _QUOTE:  # of a key that a call repeats the last counts, as in json.loads
                name = (start + 1, position - len(closing_quote))
            elif key in _ARGUMENTS_KEYS:
                arguments.append((start, position))
            key, is_value = b"", False
    return CallSpan(brace, max(position, brace + 1), name, tuple(arguments))


def matching_bracket(text: bytes, start: int, end: int) -> int:
    """Where the bracket at ``start`` is closed (exclusive), or ``end``.  The kinds of bracket are not told apart."""
    if flat := _FLAT.match(text, start, end):  # nothing nested: the loop below says the same of it
        return flat.end()
    depth = 0
    for token in _BRACKETS.finditer(text, start, end):
        first = text[token.start()]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
            if depth == 0:
                return token.end()
    return end
