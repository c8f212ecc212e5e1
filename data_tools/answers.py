"""Parts of a reference answer and of a tool list, as ToolRL writes them.

<think> thoughts </think>
<tool_call>
{"name": "...", "parameters": {...}}        one JSON object a line
</tool_call>
<response> text for the user </response>
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from data_tools.errors import RowError

# ToolRL's own stand-in for a missing thought.
PLACEHOLDER_THOUGHT = "I should use the appropriate tool with proper parameters to respond to the user's need."
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ENTRY = re.compile(r"^(\d+)\. (Name: )?(.*)$")


@dataclass(frozen=True, slots=True)
class Answer:
    """A parsed reference answer."""

    think: str | None
    calls: list[dict[str, Any]]
    response: str | None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def loads(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity are refused."""
    return _DECODER.decode(text)


def dumps(value: Any) -> str:
    """JSON text as this package stores it; what JSON cannot hold is a :class:`RowError`."""
    try:
        return _ENCODER.encode(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError(f"the tools or calls do not fit into JSON: {error}") from error


def parse_answer(text: str) -> Answer:
    """Split a tagged reference answer; raises :class:`RowError` where the reward could not read it either."""
    thought = _THINK.search(text)
    body = text[thought.end() :] if thought else text  # a thought may mention the tags
    calls_text, response = _section(body, "tool_call"), _section(body, "response")
    if calls_text is None and response is None:
        raise RowError("the reference answer has neither <tool_call> nor <response>: is this the right column?")
    calls = _parse_calls(calls_text) if calls_text is not None else []
    return Answer(thought.group(1).strip() if thought else None, calls, response)


def _section(text: str, tag: str) -> str | None:
    start = text.find(f"<{tag}>")
    if start < 0:
        return None
    end = text.find(f"</{tag}>", start)
    if end < 0:
        raise RowError(f"the reference answer opens <{tag}> and never closes it")
    return text[start + len(tag) + 2 : end].strip()


def _parse_calls(text: str) -> list[dict[str, Any]]:
    calls = []
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            call = loads(line)
        except (ValueError, RecursionError) as error:
            raise RowError(f"a tool call of the reference is not JSON ({error}): {line[:120]!r}") from error
        calls.append(check_call(call))
    if not calls:
        raise RowError("the reference answer has an empty <tool_call> section")
    return calls


def check_call(call: Any) -> dict[str, Any]:
    """One call as ``{"name", "parameters"}``; OpenAI's wrapper and the key ``arguments`` are accepted."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise RowError(f"a tool call of the reference has no name: {str(call)[:120]}")
    parameters = call.get("parameters", call.get("arguments"))
    if isinstance(parameters, str):
        try:
            parameters = loads(parameters or "{}")
        except (ValueError, RecursionError) as error:
            raise RowError(f"the arguments of call {call['name']!r} are not JSON: {error}") from error
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise RowError(f"the parameters of call {call['name']!r} are {type(parameters).__name__}, expected an object")
    return {"name": call["name"], "parameters": parameters}


def compose_answer(calls: list[dict[str, Any]], *, think: str | None = None, response: str | None = None) -> str:
    """The tagged text of an answer that came in parts."""
    parts = [f"<think> {think or PLACEHOLDER_THOUGHT} </think>"]
    if calls:
        parts.append("\n".join(["<tool_call>", *(dumps(call) for call in calls), "</tool_call>"]))
    if response is not None:
        parts.append(f"<response> {response} </response>")
    if len(parts) == 1:
        raise RowError("the reference answer has neither tool calls nor a response")
    return "\n".join(parts)


def shorten_thought(text: str, max_words: int) -> str:
    """Keep the first ``max_words`` words of the thought; the rest of the answer stays as it is."""
    thought = _THINK.search(text)
    if thought is None or len(thought.group(1).split()) <= max_words:
        return text
    words = " ".join(thought.group(1).split()[:max_words])
    return f"{text[: thought.start()]}<think> {words} </think>{text[thought.end() :]}"


def parse_tools(system: str) -> list[dict[str, Any]]:
    """The "Available Tools" of a ToolRL system message; parameters that do not parse stay as text."""
    _, found, rest = system.partition("**Available Tools**")
    if not found:
        return []
    tools: list[dict[str, Any]] = []
    for line in re.split(r"\n\*\*", rest, maxsplit=1)[0].splitlines():
        entry = _ENTRY.match(line)
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


def _parse_parameters(text: str) -> Any:
    try:
        value = loads(text)
    except (ValueError, RecursionError):
        value = _parse_literal(text)
    return value if isinstance(value, dict) else text


def _parse_literal(text: str) -> Any:
    """API-Bank writes Python literals; one that JSON cannot hold stays text."""
    try:
        value = ast.literal_eval(text)
        dumps(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return value


def check_tools(value: Any) -> list[dict[str, Any]]:
    """A ``tools`` column: a list (or its JSON text) of OpenAI functions or plain ``{"name", ...}`` objects."""
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise RowError(f"the tools are not JSON: {error}") from error
    if not isinstance(value, list):
        raise RowError(f"the tools are {type(value).__name__}, expected a list")
    tools = []
    for tool in value:
        function = tool["function"] if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"a tool has no name: {str(tool)[:120]}")
        parameters = function.get("parameters")
        if isinstance(parameters, str):
            parameters = _parse_parameters(parameters)
        description = function.get("description") or ""
        tools.append({"name": function["name"], "description": str(description), "parameters": parameters or {}})
    return tools
