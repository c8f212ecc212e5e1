"""JSON as this package reads and stores it, and values that come as JSON text where an object is meant."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from data_tools.errors import RowError
from megatron_rest.regions import REFERENCE_LIMITS, ToolCallError
from megatron_rest.regions.call_formats.literals import json_or_literal

_BEGINS_LIKE_JSON = re.compile(r'\s*"?[{\[]')


class KeyTwice(ValueError):
    """An object has a key twice: which value is meant?"""


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyTwice(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_object)
ROWS = json.JSONDecoder(object_pairs_hook=_object)
"""For whole rows: NaN and Infinity pass, since they may stand where nobody reads them."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def loads(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity are refused, and so are objects with a key twice."""
    return _DECODER.decode(text)


def dumps(value: Any) -> str:
    """JSON text as this package stores it; what JSON cannot hold is a :class:`RowError`."""
    try:
        return _ENCODER.encode(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError(f"the tools or calls do not fit into JSON: {error}") from error


def parsed(value: Any, what: str = "") -> Any:
    """The value of JSON text (written into JSON text again, too) that holds an object or a list; else as it is.

    ``what`` it should be: text that begins like JSON and is none is a :class:`RowError` then.
    """
    for _ in range(3):
        if not isinstance(value, str) or not _BEGINS_LIKE_JSON.match(value):
            return value
        try:
            value = loads(value)
        except (ValueError, RecursionError) as error:
            if not what:
                return value
            return _literal(value, what, error)
    return value


def _literal(text: str, what: str, error: Exception) -> Any:
    if isinstance(error, KeyTwice):
        raise RowError(f"{what} are not JSON: {error}") from error
    try:
        return json_or_literal(text, REFERENCE_LIMITS)  # as Python prints it
    except ToolCallError:
        raise RowError(f"{what} are not JSON: {error}") from error


def with_pairs(value: Any) -> Any:
    """A map that was stored as a list of its pairs, as an object."""
    if isinstance(value, list) and value:
        if all(isinstance(pair, dict) and pair.keys() == {"key", "value"} for pair in value):
            value = [(pair["key"], pair["value"]) for pair in value]
        if all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in value):
            pairs = dict(value)
            if len(pairs) == len(value):
                return pairs
    return value


# --- what JSON cannot hold ---------------------------------------------------------------------------------------

NOT_JSON = "$not_json"
"""Names, in a quarantine, a value that JSON cannot hold: ``{"$not_json": "nan"}``."""
_LEVELS = 200  # of nesting that a marked row keeps


def marked(value: Any, levels: int = _LEVELS) -> Any:
    """A row whose every value JSON can hold, so that it can be mended and given back."""
    if isinstance(value, (dict, list, tuple)) and not levels:
        return {NOT_JSON: "nested too deeply"}
    if isinstance(value, dict):
        return {str(key): marked(held, levels - 1) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [marked(item, levels - 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {NOT_JSON: repr(value)}
    return value


def refuse_marked(row: dict[str, Any]) -> None:
    """RowError for a row of a quarantine that was given back with a mark in it."""
    if f"'{NOT_JSON}'" in repr(row):
        raise RowError(f"the row still holds a {NOT_JSON} mark: put a value in its place")
