"""Calls as Python writes them: ``[f(city="Bern", days=3), g()]``, arguments by name, values literals.

Nothing is evaluated or compiled: a scanner of strings, brackets and commas finds the parts, and values are read by a
parser of literals (numbers, strings, lists, tuples, dictionaries, True, False, None and their JSON spellings).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rest.regions.calls import CallSpan, Limits, Schemas, ToolCall, ToolCallError, decoded, json_text, shown

__all__ = ["ANY_NAME", "PythonCalls", "closing_bracket", "parse_literal"]

_CALL = re.compile(rb"([A-Za-z_][\w.]*+)\(")
ANY_NAME = re.compile(rb"([^\s\[\](){}=,;:'\"][^\[\](){}=,;'\"\n]*?)[ \t]*\(")
"""Names that are none in Python, as data sets have them: ``[Flight Search/v2(to="Bern")]``."""
_PARTS = re.compile(rb"\"(?:[^\"\\\n]++|\\.)*+\"?|'(?:[^'\\\n]++|\\.)*+'?|[\[\](){}]", re.DOTALL)
_KEY = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"[A-Za-z]+")
_QUOTED = re.compile(r"\"((?:[^\"\\\n]|\\.)*)\"|'((?:[^'\\\n]|\\.)*)'", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class PythonCalls:
    """A list of calls, or calls one a line."""

    glue: re.Pattern[bytes] = re.compile(rb"[\s\[\],;]*")
    opening: re.Pattern[bytes] = _CALL  # a name and its bracket

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        position = start
        while opening := self.opening.search(text, position, end):
            bracket = opening.end() - 1
            position = closing_bracket(text, bracket, end)
            yield CallSpan(opening.start(), position, opening.span(1), ((bracket, position),))

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        assert call.name is not None
        name, inside = decoded(text[slice(*call.name)]), decoded(text[call.arguments[0][0] + 1 : call.end])
        if not inside.endswith(")"):
            raise ToolCallError(f"the call of {name[:60]!r} is never closed")
        parameters = _Literals(inside[:-1], limits).keywords()
        return ToolCall(name=name, parameters=parameters, raw={"name": name, "parameters": parameters})

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "[" + ", ".join(_written_call(name, arguments) for name, arguments in calls) + "]"


def _written_call(name: str, arguments: Mapping[str, Any]) -> str:
    if not all(part.isidentifier() for part in name.split(".")) or not all(key.isidentifier() for key in arguments):
        raise ToolCallError(f"{name!r} or one of its arguments is no Python name, so no call can be written so")
    return f"{name}({', '.join(f'{key}={_literal(value)}' for key, value in arguments.items())})"


def _literal(value: Any) -> str:
    """Python's spelling of a JSON value; strings in JSON's, which is also Python's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json_text(str(key))}: {_literal(held)}" for key, held in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, str):
        return json_text(value).replace("\x7f", "\\x7f")
    return {True: "True", False: "False"}[value] if isinstance(value, bool) else str(value)


def closing_bracket(text: bytes, bracket: int, end: int) -> int:
    """Behind the bracket that closes the one at ``bracket``, or ``end``; strings may have either kind of quote."""
    depth = 0
    for part in _PARTS.finditer(text, bracket, end):
        first = text[part.start()]
        if first in b"([{":
            depth += 1
        elif first in b")]}":
            depth -= 1
            if depth == 0:
                return part.end()
    return end


def parse_literal(text: str, limits: Limits) -> Any:
    """The value of a literal, Python's or JSON's; nothing is evaluated.  Raises :class:`ToolCallError`."""
    return _Literals(text, limits, joins_strings=False).whole()


class _Literals:
    """Reads ``key=literal, ...`` or one literal; raises :class:`ToolCallError` at whatever is none."""

    def __init__(self, text: str, limits: Limits, *, joins_strings: bool = True) -> None:
        self._text, self._at, self._limits, self._joins = text, 0, limits, joins_strings

    def keywords(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._is("") and not self._at_end():
            key = _KEY.match(self._text, self._at)
            if key is None:
                raise self._wrong("is not key=value")
            self._at = key.end()
            if key[1] in found:
                raise ToolCallError(f"the argument {key[1]!r} is there twice")
            found[key[1]] = self._value(1)
            if not self._take(",") and not self._at_end():
                raise self._wrong("follows a value")
        return found

    def whole(self) -> Any:
        value = self._value(1)
        if not self._at_end():
            raise self._wrong("follows the value")
        return value

    def _value(self, depth: int) -> Any:
        if depth > self._limits.depth:
            raise ToolCallError(f"{shown(self._text)} is nested deeper than {self._limits.depth}")
        self._skip()
        if self._take("["):
            return self._items("]", depth)
        if self._take("("):
            return self._items(")", depth)
        if self._take("{"):
            return self._pairs(depth)
        for pattern, make in ((_QUOTED, _string), (_NUMBER, _number), (_WORD, _word)):
            found = pattern.match(self._text, self._at)
            if found is not None:
                self._at = found.end()
                try:
                    value = make(found)
                except (ValueError, KeyError):
                    break
                self._skip()  # two strings in a row are one
                while self._joins and isinstance(value, str) and (more := _QUOTED.match(self._text, self._at)):
                    self._at, value = more.end(), value + _string(more)
                    self._skip()
                return value
        raise self._wrong("is no literal")

    def _items(self, closing: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self._take(closing):
            items.append(self._value(depth + 1))
            if not self._take(",") and not self._is(closing):
                raise self._wrong("follows an item")
        return items

    def _pairs(self, depth: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while not self._take("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str) or not self._take(":"):
                raise self._wrong("follows a key, which must be a string")
            pairs[key] = self._value(depth + 1)
            if not self._take(",") and not self._is("}"):
                raise self._wrong("follows a pair")
        return pairs

    def _skip(self) -> None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1

    def _at_end(self) -> bool:
        self._skip()
        return self._at >= len(self._text)

    def _is(self, what: str) -> bool:
        self._skip()
        return bool(what) and self._text.startswith(what, self._at)

    def _take(self, what: str) -> bool:
        if self._is(what):
            self._at += len(what)
            return True
        return False

    def _wrong(self, what: str) -> ToolCallError:
        return ToolCallError(f"{shown(self._text[self._at : self._at + 60])} {what}")


def _string(found: re.Match[str]) -> str:
    return _ESCAPE.sub(_unescaped, found[1] if found[1] is not None else found[2])


def _unescaped(found: re.Match[str]) -> str:
    what = found[1]
    if what[0] in "uUx" and len(what) > 1:
        return chr(int(what[1:], 16)) if int(what[1:], 16) < 0x110000 else found[0]
    if what[0] in "01234567":
        return chr(int(what, 8))
    return _ESCAPES.get(what, what if what in "\\'\"" else found[0])


def _number(found: re.Match[str]) -> int | float:
    text = found.group()
    value = float(text) if set(text) & set(".eE") else int(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("too large")
    return value


def _word(found: re.Match[str]) -> Any:
    return _WORDS[found.group()]
