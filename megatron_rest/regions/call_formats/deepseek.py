"""DeepSeek's calls: ``function<sep>name`` with a fenced JSON object (V3, R1), or ``name<sep>{...}`` (V3.1)."""

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

__all__ = ["BLOCK", "DeepSeekCalls"]

BLOCK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_BEGIN, _END, _SEP = (f"<｜tool▁{what}｜>" for what in ("call▁begin", "call▁end", "sep"))
_FENCE, _FENCE_END = "\n```json\n", "\n```"
_CALL = re.compile(
    rb"%b((?:(?!%b|%b|%b).)*+)(?:%b)?+" % tuple(re.escape(t.encode()) for t in (_BEGIN, _BEGIN, _SEP, _END, _SEP)),
    re.DOTALL,
)
_FENCED = re.compile(rb"([^\n{]*+)\n```json\n")


@dataclass(frozen=True, slots=True)
class DeepSeekCalls:
    """Reads both spellings; ``fenced`` says which one is written."""

    fenced: bool = True
    glue: re.Pattern[bytes] = re.compile(rb"\s*")

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        position = start
        while opening := _CALL.search(text, position, end):
            stop = text.find(_END.encode(), opening.end(), end)
            following = text.find(_BEGIN.encode(), opening.end(), end)
            body_end = min(at for at in (stop, following, end) if at >= 0)
            position = body_end + len(_END.encode()) if body_end == stop else body_end
            fenced = _FENCED.match(text, opening.end(), body_end)
            if fenced:
                closing = text.rfind(_FENCE_END.encode(), fenced.end() - 1, body_end)
                arguments = (fenced.end(), closing if closing >= fenced.end() else body_end)
                yield CallSpan(opening.start(), position, fenced.span(1), (arguments,))
            else:
                yield CallSpan(opening.start(), position, opening.span(1), ((opening.end(), body_end),))

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        assert call.name is not None
        whole, name = text[call.start : call.end], decoded(text[slice(*call.name)]).strip()
        if not whole.endswith(_END.encode()) or _SEP.encode() not in whole or not name:
            raise ToolCallError(f"{shown(decoded(whole))} is not a whole call with its name")
        value = load_json(decoded(text[slice(*call.arguments[0])]), limits)
        if not isinstance(value, dict):
            raise ToolCallError(f"the arguments of {name[:60]!r} are a {type(value).__name__}, expected an object")
        return ToolCall(name=name, parameters=value, raw={"name": name, "parameters": value})

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        def one(name: str, arguments: str) -> str:
            if self.fenced:
                return f"{_BEGIN}function{_SEP}{name}{_FENCE}{arguments}{_FENCE_END}{_END}"
            return f"{_BEGIN}{name}{_SEP}{arguments}{_END}"

        between = "\n" if self.fenced else ""
        return BLOCK[0] + between.join(one(name, json_text(arguments)) for name, arguments in calls) + BLOCK[1]
