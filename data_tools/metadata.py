"""What a row brings besides its prompt and its reference: kept by column, for rewards and environments of one's own."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_tools.columns import TOOL_PATHS, Columns, Row
from data_tools.values import parsed

__all__ = ["MAX_CHARACTERS", "metadata_of"]

MAX_CHARACTERS = 1 << 16
"""Of one row's metadata as JSON text; what is longer is left out, and counted."""
_DEEPEST = 16
_TOO_LONG = f"metadata of more than {MAX_CHARACTERS} characters was left out"
_NO_JSON = "columns that JSON cannot hold (bytes, deep nesting) were left out of the metadata"


@dataclass(frozen=True, slots=True)
class _Taken:
    """What of a row's columns is read for something else."""

    whole: frozenset[str]
    keys: dict[str, set[str]]  # of objects: column -> keys
    lists: frozenset[str]  # columns of which items are read


@lru_cache(maxsize=64)
def _taken(where: Columns, wanted: str) -> _Taken:
    whole = frozenset({*where.places, *TOOL_PATHS, wanted})
    keys: dict[str, set[str]] = {}
    lists: set[str] = set()
    for place in whole:
        for at, character in enumerate(place):
            if character == ".":
                keys.setdefault(place[:at], set()).add(_FIRST_KEY.match(place, at + 1)[0])  # type: ignore[index]
            elif character == "[":
                lists.add(place[:at])
    return _Taken(whole, keys, frozenset(lists))


_FIRST_KEY = re.compile(r"[^.\[]*")


def metadata_of(row: Row, where: Columns, *, read: frozenset[str] = frozenset(), wanted: str = "") -> tuple[str, str]:
    """JSON object of the columns that are read for nothing else, and a note of what was left out.

    Args:
        row: as it came.
        where: places that are read; of a place inside a column (``reward_model.ground_truth``) the rest of it stays.
        read: columns that the layout reads in a way of its own.
        wanted: the column of ``--reference``.
    """
    taken = _taken(where, wanted)
    kept: dict[str, Any] = {}
    note = ""
    for name, value in row.items():
        if name in taken.whole or name in read or name == "_row":
            continue
        inner = taken.keys.get(name)
        inside = parsed(value) if inner else value
        if inner and isinstance(inside, dict):
            value = {key: one for key, one in inside.items() if key not in inner}
            if not value:
                continue
        elif name in taken.lists:
            continue
        try:
            if value is not None:
                kept[str(name)] = _plain(value, 0)
        except ValueError:
            note = _NO_JSON
    text = json.dumps(kept, ensure_ascii=False, allow_nan=False)
    text = text.encode(errors="replace").decode()  # half a surrogate pair, which no file can hold
    return ("{}", _TOO_LONG) if len(text) > MAX_CHARACTERS else (text, note)


def _plain(value: Any, depth: int) -> Any:
    """As JSON has it: numbers that are not finite are null, dates and decimals text."""
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    if isinstance(value, dict):
        return {str(key): _plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    raise ValueError(f"{type(value).__name__} is no JSON")
