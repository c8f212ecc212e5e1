"""Calls of a row as ``{"name", "parameters"}``, from values of many spellings; text: :mod:`data_tools.call_texts`."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from data_tools.errors import RowError
from data_tools.tool_lists import Tool, fields_of
from data_tools.values import parsed, with_pairs

Call = dict[str, Any]
NAME_KEYS = ("name", "function", "tool_name", "function_name", "tool", "api_name", "action")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "kwargs", "input", "tool_input", "action_input")
_SURE_KEYS = {"arguments", "args", "kwargs", "tool_input", "action_input"}
_ASIDE = {"id", "type", "index", "call_id", "tool_call_id", "requestor", "status", "caller", "cache_control", "error"}


def read_calls(value: Any) -> list[Call]:
    """A list of calls, one call, or JSON text of either."""
    value = parsed(value, "the calls")
    if isinstance(value, dict):
        value = parsed(value.get("tool_calls"), "the calls") if value.get("tool_calls") else [value]
    if not isinstance(value, list):
        raise RowError(f"the calls are {type(value).__name__}, expected a list")
    return [read_call(item) for item in value]


def read_call(value: Any) -> Call:
    """One call; RowError for one whose name or arguments are not where data sets have them."""
    value = with_pairs(parsed(value, "a call"))
    inner = parsed(value.get("function")) if isinstance(value, dict) else None
    if isinstance(inner, dict):
        value = inner
    elif isinstance(value, dict):  # Gemini's
        value = next(
            (value[key] for key in ("functionCall", "function_call") if isinstance(value.get(key), dict)), value
        )
    if not isinstance(value, dict):
        raise RowError(f"a tool call is {type(value).__name__}, expected an object: {str(value)[:120]}")
    value = {key: item for key, item in value.items() if item is not None}
    keys = [key for key in NAME_KEYS if isinstance(value.get(key), str) and value[key].strip()]
    if not keys:
        raise RowError(f"a tool call has no name: {str(value)[:120]}", _no_name(value))
    name = value[keys[0]]
    given = {key: value[key] for key in ARGUMENT_KEYS if key in value and key != keys[0]}
    if len({str(item) for item in given.values()}) > 1:
        raise RowError(f"the call of {name!r} has arguments under {' and '.join(given)}: which are meant?")
    others = value.keys() - {*given, *NAME_KEYS} - _ASIDE
    if not given and others:
        raise RowError(
            f"the call of {name!r} has no arguments under {', '.join(ARGUMENT_KEYS)}: "
            f"it has {', '.join(sorted(others))}",
            "an --adapter can rename them",
        )
    return {"name": name, "parameters": _arguments(next(iter(given.values()), None), name)}


def is_call(value: Any, names: Collection[str] = ()) -> bool:
    """Whether an object is a call: it has a name, one of ``names`` or with arguments beside it."""
    inner = value.get("function") if isinstance(value, dict) else None
    value = inner if isinstance(inner, dict) else value
    if not isinstance(value, dict):
        return False
    called = [value[key] for key in NAME_KEYS if isinstance(value.get(key), str)]
    return bool(called) and (called[0] in names or any(key in value for key in ARGUMENT_KEYS))


_CALL_TEXT = re.compile(
    rf"\s*\[?\s*\{{.*\"(?:{'|'.join(NAME_KEYS)})\"\s*:.*\"(?:{'|'.join(ARGUMENT_KEYS)})\"\s*:.*\}}\s*\]?\s*\Z",
    re.DOTALL,
)


def holds_calls(value: Any, names: Collection[str] = ()) -> bool:
    """Whether a value that is not read is a call (of a tool in ``names``), or a list with one; tools are none.

    So is text of calls that is no JSON for a NaN in it.
    """
    value = parsed(value)
    if isinstance(value, str):
        return bool(_CALL_TEXT.match(value)) and '"description"' not in value
    items = [parsed(item) for item in (value if isinstance(value, list) else [value])]
    return any(
        isinstance(item, dict)
        and (is_call(item, names) or _SURE_KEYS & item.keys() or item.get("type") == "function")
        and "description" not in {*item, *(item.get("function") or ())}
        for item in items
    )


def _no_name(value: dict[str, Any]) -> str:
    if len(value) == 1 and isinstance(next(iter(value.values())), dict):
        return "this is BFCL's form of possible answers (values in lists), for evaluation: docs/evaluation.md"
    return ""


def _arguments(value: Any, name: str) -> dict[str, Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    value = with_pairs(parsed(value, f"the arguments of call {name!r}"))
    if not isinstance(value, dict):
        raise RowError(f"the parameters of call {name!r} are {type(value).__name__}, expected an object")
    return value


def without_meaningless_nulls(calls: list[Call], tools: list[Tool], nulls: str) -> list[Call]:
    """Calls without arguments that are null, unless the tool requires the parameter or its type allows null.

    Arrow unites the keys of all objects of a column and fills the gaps with null, and what writes JSON from such a
    table keeps them; only the tool says whether a null was meant.
    """
    if nulls == "keep" or not any(_has_null(call["parameters"]) for call in calls):
        return calls
    schemas = {tool["name"]: tool["parameters"] for tool in tools} if nulls == "auto" else {}
    return [{**call, "parameters": _pruned(call["parameters"], schemas.get(call["name"]))} for call in calls]


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(_has_null(item) for item in value)


def _pruned(value: Any, schema: Any) -> Any:
    if isinstance(value, dict):
        fields, required = fields_of(schema)
        return {
            key: _pruned(item, fields.get(key))
            for key, item in value.items()
            if item is not None or key in required or allows_null(fields.get(key))
        }
    if isinstance(value, list):
        return [_pruned(item, schema.get("items") if isinstance(schema, dict) else None) for item in value]
    return value


def allows_null(schema: Any) -> bool:
    """Whether a parameter's schema lets it be null."""
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    choices = [*_list(schema.get("anyOf")), *_list(schema.get("oneOf"))]
    return (
        "null" in kinds
        or schema.get("nullable") is True
        or None in _list(schema.get("enum"))
        or any(allows_null(choice) for choice in choices)
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
