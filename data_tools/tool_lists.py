"""Tools of a row, from a column or from the system message, as ``{"name", "description", "parameters"}``.

Whatever describes the parameters is kept whole: a JSON schema with what is required, or the parameters themselves as
ToolRL, API-Bank and xLAM list them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from data_tools.errors import RowError
from data_tools.values import dumps, parsed, with_pairs
from megatron_rest.regions import REFERENCE_LIMITS, ToolCallError
from megatron_rest.regions.call_formats.literals import json_or_literal
from megatron_rest.regions.call_formats.python import closing_bracket

Tool = dict[str, Any]
TOOL_LIST = "**Available Tools**"  # heads ToolRL's list in a system message
_ENTRY = re.compile(r"^(\d+)\. (Name: )?(.*)$")
_NAMES = ("name", "tool_name", "function_name", "api_name")
_DESCRIPTIONS = ("description", "desc", "api_description", "tool_description")
_PARAMETERS = ("parameters", "inputSchema", "input_schema", "parameters_json_schema", "arguments", "args", "input")
_TEXTS = ("description", "title", "pattern", "format", "$ref", "$schema", "$id", "name")  # of a schema: never JSON text
_VALUES = ("enum", "default", "const", "examples", "example")  # of a schema: data of any kind


def read_tools(value: Any) -> list[Tool]:
    """A ``tools`` column: OpenAI's functions, MCP's and Anthropic's tools, plain objects, an object of them by name, as
    values or as JSON text at any depth."""
    if isinstance(value, str):
        return list(_tools_of_text(value))
    return _read_tools(value)


@lru_cache(maxsize=256)
def _tools_of_text(text: str) -> tuple[Tool, ...]:
    """The rows of a set mostly share their lists of tools."""
    return tuple(_read_tools(text))


def _read_tools(value: Any) -> list[Tool]:
    value = with_pairs(parsed(value, "the tools"))
    if value is None or value == "":
        return []
    if isinstance(value, dict):
        value = _listed(value)
    if not isinstance(value, list):
        raise RowError(f"the tools are {type(value).__name__}, expected a list")
    tools = [tool for item in value for tool in _tools_of(item)]
    names = [tool["name"] for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        tools = _without_copies(tools, twice)
    return tools


def _listed(value: dict[str, Any]) -> list[Any]:
    value = {key: item for key, item in value.items() if item is not None}
    if any(key in value for key in (*_NAMES, "function", "functionDeclarations", "function_declarations")):
        return [value]
    if value and all(isinstance(parsed(item), dict) for item in value.values()):  # by name
        return [{"name": name, **_plain(parsed(item))} for name, item in value.items()]
    if not value:
        return []
    raise RowError(f"the tools are one object without a name: {str(value)[:120]}")


def _plain(tool: dict[str, Any]) -> dict[str, Any]:
    inner = parsed(tool.get("function"))
    return inner if isinstance(inner, dict) else tool


def _tools_of(item: Any) -> Iterator[Tool]:
    item = with_pairs(parsed(item, "the tools"))
    if isinstance(item, dict):
        group = parsed(item.get("functionDeclarations") or item.get("function_declarations"))
        if isinstance(group, list):  # Gemini's
            for inner in group:
                yield from _tools_of(inner)
            return
    yield _tool(item)


def _tool(item: Any) -> Tool:
    function = with_pairs(_plain(item)) if isinstance(item, dict) else item
    if not isinstance(function, dict):
        raise RowError(f"a tool has no name: {str(item)[:120]}")
    name = next((function[key] for key in _NAMES if isinstance(function.get(key), str)), None)
    if name is None and isinstance(item, dict) and isinstance(item.get("name"), str):
        name = item["name"]
    if not name:
        raise RowError(f"a tool has no name: {str(item)[:120]}")
    description = next((function[key] for key in _DESCRIPTIONS if function.get(key) is not None), "")
    given: Any = next((function[key] for key in _PARAMETERS if function.get(key) is not None), {})
    parameters = _parameters(given, name)
    required = parsed(function.get("required"))
    if isinstance(required, list) and isinstance(parameters, dict):  # beside the parameters: ToolACE, BFCL's relatives
        if "properties" in parameters:
            parameters = {**parameters, "required": parameters.get("required", required)}
        else:
            parameters = {"type": "object", "properties": parameters, "required": required}
    return {"name": name, "description": str(description), "parameters": parameters}


def _parameters(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return _parse_parameters(value)
    value = with_pairs(value)
    if isinstance(value, list):
        value = _parameter_list(value, name)
    if not isinstance(value, dict):
        raise RowError(f"the parameters of tool {name!r} are {type(value).__name__}, expected a JSON schema")
    return without_padding(value)


def _parameter_list(value: list[Any], name: str) -> dict[str, Any]:
    """``[{"name": "town", "type": "string", "required": true}]``."""
    items = [parsed(item) for item in value]
    if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items):
        raise RowError(f"the parameters of tool {name!r} are a list, expected a JSON schema")
    properties = {i["name"]: {k: v for k, v in i.items() if k not in ("name", "required")} for i in items}
    required = [item["name"] for item in items if item.get("required") is True]
    return {"type": "object", "properties": properties, "required": required}


def _without_copies(tools: list[Tool], twice: str) -> list[Tool]:
    kept: list[Tool] = []
    for tool in tools:
        same = next((known for known in kept if known["name"] == tool["name"]), None)
        if same is None:
            kept.append(tool)
        elif same != tool:
            raise RowError(f"two different tools are called {twice!r}: a call could mean either")
    return kept


def without_padding(schema: Any) -> Any:
    """A schema without nulls, which say nothing in one: they are what Arrow fills gaps with.  Lists stay as they are.

    Structure that was stored as JSON text or as a map's pairs is an object again.
    """
    if isinstance(schema, dict):
        clean: dict[str, Any] = {}
        for key, value in schema.items():
            if value is None:
                continue
            if not isinstance(value, dict) and (key in _VALUES or (key in _TEXTS and isinstance(value, str))):
                clean[key] = value
            else:
                clean[key] = without_padding(with_pairs(parsed(value)))
        return clean
    if isinstance(schema, list):
        return [without_padding(item) if isinstance(item, (dict, list)) else item for item in schema]
    return schema


@lru_cache(maxsize=1024)
def _parse_parameters(text: str) -> Any:
    """Parameters that do not parse stay text.  What comes back is shared: nobody may change it."""
    try:
        value = parsed(text, "the parameters")
        if not isinstance(value, dict):
            return text
        dumps(value)
    except RowError:
        return text
    return value


def fields_of(parameters: Any) -> tuple[dict[str, Any], list[str]]:
    """(schemas of the parameters by name, names of those required), in whichever way a tool lists them."""
    if not isinstance(parameters, dict):
        return {}, []
    if isinstance(parameters.get("properties"), dict):
        required = parameters.get("required")
        return parameters["properties"], [n for n in required if isinstance(n, str)] if isinstance(
            required, list
        ) else []
    if parameters.get("type") in ("object", "dict") and not isinstance(parameters.get("type"), dict):
        return {}, []
    required = [name for name, field in parameters.items() if isinstance(field, dict) and field.get("required") is True]
    return parameters, required


def tools_of_system(system: str) -> tuple[list[Tool], str]:
    """(tools that a system message lists, what else it says).

    ToolRL's own list stays where it is.  Of any other the list and the instructions for a format of calls are left out:
    the prompt says both in the form that the reward wants.
    """
    if TOOL_LIST in system:
        return toolrl_list(system), system
    found = _foreign_list(system)
    if found is None:
        return [], system
    tools, start, end = found
    return tools, _without_instructions(system[:start], system[end:])


def without_list(system: str) -> str:
    """A system message beside a ``tools`` column: a second list and instructions for another format are left out."""
    if TOOL_LIST in system:
        return system
    found = _foreign_list(system)
    if found is None:
        return system
    return _without_instructions(system[: found[1]], system[found[2] :])


_OPENINGS = re.compile(r"[\[{]")
_BLOCK = re.compile(r"<(tools|AVAILABLE_TOOLS|available_tools|functions|function_list)>\s*(?=[\[{])")
# What asks for calls in a form: behind a list of tools such text is replaced, not kept.
_ASKS = re.compile(
    r"</?tool_calls?>|</?TOOLCALL>|<functioncall>|<function_call>|\[?\bfunc\w*\(|format of \[|\bno other text\b"
    r"|\band nothing else\b|Action Input|<\|python_tag\|>|pydantic|each (?:function|tool) call\b",
    re.IGNORECASE,
)
_MENTIONS_LIST = re.compile(r"[^.\n]*</?tools>[^.\n]*\.?")
_HEADING = re.compile(r"[^.\n]*:\s*$")  # of the list
_SHORT_REST = 80  # of what follows the last instruction: its own end, not a policy


def _foreign_list(system: str) -> tuple[list[Tool], int, int] | None:
    block = _BLOCK.search(system)
    start = block.end() if block else 0
    raw = system.encode("utf-8", "surrogatepass")
    while opening := _OPENINGS.search(system, start):
        tools, end = _objects(system, raw, opening.start())
        if tools:
            first = block.start() if block else opening.start()
            if block:
                closing = f"</{block[1]}>"
                after = system.find(closing, end)
                end = after + len(closing) if after >= 0 and not system[end:after].strip() else end
            return tools, first, end
        start = opening.end()
        if start - (block.end() if block else 0) > 100_000:
            return None
    return None


def _objects(system: str, raw: bytes, start: int) -> tuple[list[Tool], int]:
    """Tools as one list, or as objects one behind the other; none where it is something else."""
    tools: list[Tool] = []
    position = start
    while position < len(system) and system[position] in "[{":
        first = len(system[:position].encode("utf-8", "surrogatepass"))
        text = raw[first : closing_bracket(raw, first, len(raw))].decode("utf-8", "surrogatepass")
        try:
            value = json_or_literal(text, REFERENCE_LIMITS)
            items = value if isinstance(value, list) else [value]
            if not items or not all(_is_tool(item) for item in items):
                break
            tools += read_tools(items)
        except (ToolCallError, RowError):
            break
        end = position + len(text)
        position = end + len(system[end:]) - len(system[end:].lstrip(" \t\r\n,"))
        if isinstance(value, list):
            return tools, end
    return (tools, end) if tools else ([], start)


def _is_tool(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    plain = _plain(item)
    return any(isinstance(plain.get(key), str) for key in _NAMES) and any(
        isinstance(plain.get(key), (dict, list)) or "description" in plain for key in _PARAMETERS
    )


def _without_instructions(before: str, after: str) -> str:
    before = _HEADING.sub("", _MENTIONS_LIST.sub("", before).rstrip()).strip()
    asks = [found.end() for found in _ASKS.finditer(after)]
    rest = after
    if asks:
        line = after.find("\n\n", asks[-1])
        rest = after[line:] if line >= 0 else ""
        if len(rest.strip()) < _SHORT_REST:
            rest = ""
    return "\n\n".join(part for part in (before, rest.strip()) if part)


def toolrl_list(system: str) -> list[Tool]:
    """The "Available Tools" of a ToolRL system message; parameters that do not parse stay as text."""
    _, found, rest = system.partition(TOOL_LIST)
    if not found:
        return []
    tools: list[Tool] = []
    for line in rest.partition("\n**")[0].splitlines():
        entry = _ENTRY.match(line) if line[:1].isdecimal() else None
        if entry and int(entry.group(1)) == len(tools) + 1:
            name, description = entry.group(3), ""
            if not entry.group(2):
                name, _, description = name.partition(": ")
            tools.append({"name": name.strip(), "description": description, "parameters": {}})
        elif tools and line.startswith("Description: "):
            tools[-1]["description"] = line.removeprefix("Description: ")
        elif tools and line.startswith("Parameters: "):
            tools[-1]["parameters"] = _parse_parameters(line.removeprefix("Parameters: "))
        elif tools and line.strip() and isinstance(tools[-1]["parameters"], dict) and not tools[-1]["parameters"]:
            tools[-1]["description"] += "\n" + line  # a description of several lines
    return tools
