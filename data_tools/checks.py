"""What is suspicious about a reference beside its reward: calls of tools that are not there, arguments that do not fit.

A row with such a problem may be right (a set without tool lists) or useless; ``--on-problem`` decides, and the counts
are printed and kept in the manifest.
"""

from __future__ import annotations

from typing import Any

from data_tools.calls import Call, allows_null
from data_tools.tool_lists import Tool, fields_of

POLICIES = ("keep", "quarantine", "stop")
NO_TOOLS = "calls, and the row lists no tools"
UNREAD = "the reference makes no call, and a column that is not read holds some"

_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("string", "str", "text"), str),
    **dict.fromkeys(("integer", "int", "long"), int),
    **dict.fromkeys(("number", "float", "double"), (int, float)),
    **dict.fromkeys(("boolean", "bool"), bool),
    **dict.fromkeys(("array", "list", "tuple"), list),
    **dict.fromkeys(("object", "dict"), dict),
}


def problems_of(calls: list[Call], tools: list[Tool]) -> list[str]:
    """What is wrong with calls under the row's own tools: ``kind: detail``."""
    if calls and not tools:
        return [NO_TOOLS]
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    found: list[str] = []
    for call in calls:
        name, arguments = call["name"], call["parameters"]
        if name not in schemas:
            found.append(f"a called tool is not among the row's tools: {name}")
        elif isinstance(schemas[name], dict):
            found += _misfits(name, arguments, schemas[name])
    return found


def _misfits(name: str, arguments: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    fields, required = fields_of(schema)
    found = [f"a required argument is missing: {name}({key}=...)" for key in required if key not in arguments]
    is_listed = fields and not schema.get("additionalProperties") and not schema.get("patternProperties")
    for key, value in arguments.items():
        if key not in fields:
            if is_listed:
                found.append(f"an argument is not among the tool's parameters: {name}({key}=...)")
        elif not _fits(value, fields[key]):
            found.append(f"an argument is not of its parameter's type: {name}({key}={str(value)[:40]!r})")
    return found


def _fits(value: Any, schema: Any) -> bool:
    if not isinstance(schema, dict) or "anyOf" in schema or "oneOf" in schema or "$ref" in schema:
        return True
    if value is None:
        return allows_null(schema) or "type" not in schema
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    known = [_TYPES[kind.lower()] for kind in kinds if isinstance(kind, str) and kind.lower() in _TYPES]
    if len(known) < len([kind for kind in kinds if kind != "null"]):
        return True  # a type that is not JSON Schema's says nothing
    return any(_is_of(value, kind) for kind in known)


def _is_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is int and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, kind)
