"""Names and arguments of the JSON tool calls in a stretch of bytes, whatever its state.

Not a parser: a scan of strings and brackets that keeps the depth, so it works on truncated and on broken JSON and never
raises.  A *call object* is an object with nothing but arrays around it.  In it, at its own depth, the value of the
name key is a name and the value of an arguments key is arguments, in any order; the same keys deeper down are data.

Two rules keep one broken call from swallowing the next: a string ends at a raw newline (JSON forbids one inside), and a
``{`` where a call object must have a key starts a new call.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence

from megatron_rest.token_region import TokenRegion

__all__ = ["call_spans"]

_STRING = rb'"(?:[^"\\\n]++|\\[^\n])*+("?)'  # group: the closing quote, empty if there is none
_IN_CALL = re.compile(
    rb"\s*+(" + _STRING + rb"|[{}\[\]:,]|[^\s{}\[\]:,\"]++)"
)  # the last: a number, true, null or junk
_BRACKETS = re.compile(_STRING + rb"|[{}\[\]]")
_QUOTE, _COLON, _COMMA, _OPEN, _CLOSE = b'":,{}'

Span = tuple[int, int, TokenRegion]


def call_spans(text: bytes, start: int, end: int, *, name_key: bytes, args_keys: Sequence[bytes]) -> Iterator[Span]:
    """``(start, end, region)`` of every call's name (between its quotes) and arguments (brackets or quotes included).

    Of a key that a call repeats, the last one counts for the name, as in ``json.loads``.
    """
    position = start
    while (brace := text.find(b"{", position, end)) >= 0:
        position = yield from _call(text, brace + 1, end, name_key, args_keys)


def _call(
    text: bytes, position: int, end: int, name_key: bytes, args_keys: Sequence[bytes]
) -> Generator[Span, None, int]:
    """Scan a call object from behind its ``{``; returns where it stops: behind its ``}``, at a new call, at the end."""
    name: Span | None = None
    key, is_value = b"", False
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
                position = _matching(text, start, end)
            if key == name_key and first == _QUOTE:
                name = (start + 1, position - len(closing_quote), TokenRegion.TOOL_NAME)
            elif key in args_keys:
                yield start, position, TokenRegion.TOOL_ARGS
            key, is_value = b"", False
    if name is not None:
        yield name
    return position


def _matching(text: bytes, start: int, end: int) -> int:
    """Where the bracket at ``start`` is closed (exclusive), or ``end``.  The kinds of bracket are not told apart."""
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
