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

__all__ = ["GlmCalls", "QwenXmlCalls"]

_FUNCTION = re.compile(rb"<function=([^>\n]*+)(>?)")
_FUNCTION_END = re.compile(rb"</function>|(?=<function=)")
_PARAMETER = re.compile(rb"<parameter=([^>\n]*+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_GLM_NAME = re.compile(rb"\s*+([^\s<]*+)")
_GLM_ARGUMENT = re.compile(
    rb"<arg_key>(.*?)(?:</arg_key>|\Z)\s*+(?:<arg_value>(.*?)(?:</arg_value>|(?=<arg_key>)|\Z))?+", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class QwenXmlCalls:
    """Qwen3-Coder, Qwen3.5: ``<function=name>`` with ``<parameter=key>`` elements."""

    glue: re.Pattern[bytes] = re.compile(rb"\s*")

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        position = start
        while opening := _FUNCTION.search(text, position, end):
            body = opening.end()
            closing = _FUNCTION_END.search(text, body, end)
            body_end = closing.start() if closing else end
            first = text.find(b"<parameter=", body, body_end)
            last = text.rfind(b"</parameter>", body, body_end)
            stop = last + len(b"</parameter>") if last > first else body_end
            position = closing.end() if closing else end
            yield CallSpan(opening.start(), position, opening.span(1), ((first, stop),) if first >= 0 else ())

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        whole = text[call.start : call.end]
        opening = _FUNCTION.match(whole)
        if opening is None or not opening.group(2) or not whole.endswith(b"</function>"):
            raise ToolCallError(f"{shown(decoded(whole))} is not <function=name> ... </function>")
        name = decoded(opening.group(1)).strip()
        body = whole[opening.end() : -len(b"</function>")]
        return _call(name, _PARAMETER, body, b"</parameter>", limits, schemas, trim=True)

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "\n".join(
            f"<tool_call>\n<function={name}>\n"
            + "".join(f"<parameter={key}>\n{_written(value)}\n</parameter>\n" for key, value in arguments.items())
            + "</function>\n</tool_call>"
            for name, arguments in calls
        )


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
            value = value.removeprefix("\n").removesuffix("\n")
        parameters[key] = json_value(value, schemas.get(name, {}).get(key), limits)
        position = element.end()
    if body[position:].strip():
        raise ToolCallError(f"the call of {name[:60]!r} has {shown(decoded(body[position:]))} among its arguments")
    return ToolCall(name=name, parameters=parameters, raw={"name": name, "parameters": parameters})


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json_text(value)
