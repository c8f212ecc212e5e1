"""What every way of spelling calls has in common: where a call's parts stand, and what the call is.

A format is asked twice about the same bytes.  :meth:`CallFormat.scan` finds where names and arguments are, whatever the
state of the text, and never raises: regions are painted from it.  :meth:`CallFormat.load` makes a value of one call
that was found, or says why it is none: rewards, environments and evaluation work on that.  So no two readers can
disagree about where a call is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

__all__ = [
    "MAX_BLOCK_CHARACTERS",
    "MAX_CALLS",
    "MAX_DEPTH",
    "MAX_SHOWN_CHARACTERS",
    "CallFormat",
    "CallSpan",
    "Limits",
    "Schemas",
    "Span",
    "ToolCall",
    "ToolCallError",
    "decoded",
    "json_text",
    "json_value",
    "load_json",
    "nesting_depth",
    "refuse_constant",
    "schemas_of",
    "shown",
]

MAX_BLOCK_CHARACTERS = 1 << 16  # a response of 2,048 tokens has about 8,000
MAX_CALLS = 64  # of one answer
MAX_DEPTH = 32  # far below Python's recursion limit, far above real arguments
MAX_SHOWN_CHARACTERS = 60  # of a bad call, in messages

Span = tuple[int, int]
Schemas = Mapping[str, Mapping[str, Any]]
"""``{tool: {parameter: JSON schema}}``, for formats that write values without their types."""


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Schemas of every tool's parameters, of ``{"name", "parameters"}`` with a JSON schema or plain properties."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        name, parameters = tool.get("name"), tool.get("parameters")
        if isinstance(name, str) and isinstance(parameters, Mapping):
            properties = parameters.get("properties", parameters)
            if isinstance(properties, Mapping):
                found[name] = properties
    return found


_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class ToolCallError(ValueError):
    """A call cannot be read; the message says which text and why."""


@dataclass(frozen=True, slots=True)
class CallSpan:
    """Where a call stands: bytes ``start .. end``, in it its name and its arguments (of each key that holds some)."""

    start: int
    end: int
    name: Span | None
    arguments: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that was read.  ``raw`` is the whole object as it was written, its arguments under ``parameters``."""

    name: Any
    parameters: dict[str, Any]
    raw: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what is parsed: tight for text that a policy wrote, wide for a reference."""

    characters: int = MAX_BLOCK_CHARACTERS
    depth: int = MAX_DEPTH
    calls: int = MAX_CALLS


class CallFormat(Protocol):
    """One way of spelling calls."""

    @property
    def glue(self) -> re.Pattern[bytes]:
        """What may stand between calls; anything else there is an error of the block."""
        ...

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        """The calls that begin in ``text[start:end]``, in order; broken ones too.  Never raises."""
        ...

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        """The call; raises :class:`ToolCallError`."""
        ...

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Names and arguments as a model of this format writes them, the section's tags included."""
        ...


def decoded(text: bytes) -> str:
    """Bytes of a text that may hold lone surrogates (escapes of JSON can make them) or half characters."""
    try:
        return text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace")


def load_json(text: str, limits: Limits) -> Any:
    """Strict JSON within limits.  Raises :class:`ToolCallError`."""
    if text.count("{") + text.count("[") > limits.depth and nesting_depth(text) > limits.depth:
        raise ToolCallError(f"{shown(text)} is nested deeper than {limits.depth}")
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ToolCallError(f"{shown(text)} is not JSON: {error}") from None


def json_text(value: Any) -> str:
    """JSON as templates write it (``tojson``)."""
    return _ENCODER.encode(value)


_WORDS = {"True": True, "False": False, "None": None}  # what Jinja's ``string`` filter makes of them


def json_value(text: str, schema: Mapping[str, Any] | None, limits: Limits) -> Any:
    """The value of an argument that is written without its type: JSON where it is some, else the text itself.

    With a schema that says ``string`` it is the text, whatever it looks like.
    """
    if schema is not None and schema.get("type") == "string":
        return text
    if text in _WORDS:
        return _WORDS[text]
    try:
        return load_json(text, limits)
    except ToolCallError:
        return text


def nesting_depth(text: str) -> int:
    """Deepest nesting of brackets outside strings."""
    depth = deepest = 0
    for character in _STRING.sub("", text):
        if character in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "}]":
            depth -= 1
    return deepest


def refuse_constant(name: str) -> NoReturn:
    """For ``parse_constant``: NaN and Infinity are not JSON."""
    raise ValueError(f"{name} is not JSON")


def shown(text: str) -> str:
    """The beginning of a text, for messages."""
    return repr(text.strip()[:MAX_SHOWN_CHARACTERS])


_DECODER = json.JSONDecoder(parse_constant=refuse_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False)
