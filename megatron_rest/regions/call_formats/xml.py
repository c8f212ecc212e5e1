"""Calls as XML-like elements, values written without their types.

    <function=f>                                       f
    <parameter=city>                                   <arg_key>city</arg_key>
    Bern                                               <arg_value>Bern</arg_value>
    </parameter>
    </function>
    Qwen3-Coder                                        GLM-4.5

A value is JSON where it parses as such and text where it does not; a tool's schema decides where the two differ
("12345" as a postcode).  Arguments are painted from the first element to the last, the elements' own tags included, as
the braces of JSON arguments are.
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
    json_value,
    shown,
)

__all__ = ["ElementCalls", "GlmCalls"]

_FUNCTION = re.compile(rb"<function=([^>\n]*+)(>?)")
_PARAMETER = re.compile(rb"<parameter=([^>\n]*+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_PARAMETER_END = b"</parameter>"
_GLM_NAME = re.compile(rb"\s*+([^\s<]*+)")
_GLM_ARGUMENT = re.compile(
    rb"<arg_key>(.*?)(?:</arg_key>|\Z)\s*+(?:<arg_value>(.*?)(?:</arg_value>|(?=<arg_key>)|\Z))?+", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ElementCalls:
    """A call is an element that names its function, and holds an element a parameter: by default as Qwen3-Coder and
    Qwen3.5 write it.

    ``opening`` is the tag that begins a call, its first group the name, its second the closing ``>``; ``parameter`` one
    whole element.  ``element`` and ``argument`` are what these tags begin with, ``closing`` ends a call; ``forms`` are
    how a call, a parameter and what is around a call are written.
    """

    glue: re.Pattern[bytes] = re.compile(rb"\s*")
    opening: re.Pattern[bytes] = _FUNCTION
    parameter: re.Pattern[bytes] = _PARAMETER
    element: bytes = b"<function="
    argument: bytes = b"<parameter="
    closing: bytes = b"</function>"
    forms: tuple[str, str, str] = (
        "<function=%s>\n%s</function>",
        "<parameter=%s>\n%s\n</parameter>\n",
        "<tool_call>\n%s\n</tool_call>",
    )

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        position = start
        while opening := self.opening.search(text, position, end):
            body = opening.end()
            closing, following = text.find(self.closing, body, end), text.find(self.element, body, end)
            body_end = min((at for at in (closing, following) if at >= 0), default=end)
            first = text.find(self.argument, body, body_end)
            last = text.rfind(_PARAMETER_END, body, body_end)
            stop = last + len(_PARAMETER_END) if last > first else body_end
            position = body_end + len(self.closing) if body_end == closing else body_end
            yield CallSpan(opening.start(), position, opening.span(1), ((first, stop),) if first >= 0 else ())

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        whole = text[call.start : call.end]
        opening = self.opening.match(whole)
        if opening is None or not opening.group(2) or not whole.endswith(self.closing):
            form = decoded(self.element + b"name> ... " + self.closing)
            raise ToolCallError(f"{shown(decoded(whole))} is not {form}")
        name = decoded(opening.group(1)).strip()
        body = whole[opening.end() : -len(self.closing)]
        return _call(name, self.parameter, body, _PARAMETER_END, limits, schemas, trim=True)

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        call, parameter, around = self.forms
        written = [
            around % (call % (name, "".join(parameter % (key, _written(value)) for key, value in arguments.items())))
            for name, arguments in calls
        ]
        return "\n".join(written)


@dataclass(frozen=True, slots=True)
class GlmCalls:
    """GLM-4.5 and later: one call a section, the name first, then ``<arg_key>`` and ``<arg_value>`` elements."""

    glue: re.Pattern[bytes] = re.compile(rb"\s*")

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        name = _GLM_NAME.match(text, start, end)
        assert name is not None  # the pattern matches the empty text
        if not name.group(1):
            return
        first = text.find(b"<arg_key>", name.end(), end)
        last = text.rfind(b"</arg_value>", name.end(), end)
        stop = last + len(b"</arg_value>") if last > first else end
        yield CallSpan(name.start(1), end, name.span(1), ((first, stop),) if first >= 0 else ())

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        assert call.name is not None
        name, body = decoded(text[slice(*call.name)]), text[call.name[1] : call.end]
        return _call(name, _GLM_ARGUMENT, body, b"</arg_value>", limits, schemas, trim=False)

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "\n".join(
            f"<tool_call>{name}\n"
            + "".join(
                f"<arg_key>{key}</arg_key>\n<arg_value>{_written(value)}</arg_value>\n"
                for key, value in arguments.items()
            )
            + "</tool_call>"
            for name, arguments in calls
        )


def _call(
    name: str,
    pattern: re.Pattern[bytes],
    body: bytes,
    closing: bytes,
    limits: Limits,
    schemas: Schemas,
    *,
    trim: bool,
) -> ToolCall:
    if not name:
        raise ToolCallError(f"a call without a name: {shown(decoded(body))}")
    parameters: dict[str, Any] = {}
    position = 0
    for element in pattern.finditer(body):
        if body[position : element.start()].strip() or not element.group().endswith(closing):
            break
        key, value = decoded(element.group(1)).strip(), decoded(element.group(2) or b"")
        if trim:  # the newlines that the template puts around a value
            value = value.removeprefix("\r").removeprefix("\n").removesuffix("\n").removesuffix("\r")
        parameters[key] = json_value(value, schemas.get(name, {}).get(key), limits)
        position = element.end()
    if body[position:].strip():
        raise ToolCallError(f"the call of {name[:60]!r} has {shown(decoded(body[position:]))} among its arguments")
    return ToolCall(name=name, parameters=parameters, raw={"name": name, "parameters": parameters})


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json_text(value)
