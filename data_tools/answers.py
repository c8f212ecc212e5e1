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
from megatron_rest.rewards.parsing import ReferenceAnswerError, read_reference

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
    """Split a tagged reference answer, as the reward reads it; :class:`RowError` with the reason where it could not."""
    try:
        reference = read_reference(text)
    except ReferenceAnswerError as error:
        raise RowError(str(error)) from error
    if not reference.sections:
        raise RowError("the reference answer has neither <tool_call> nor <response>: is this the right column?")
    if not reference.is_closed:
        raise RowError("the reference answer opens <response> and never closes it")
    calls = [{"name": call.name, "parameters": call.parameters} for call in reference.calls]
    return Answer(reference.thought, calls, reference.response)


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


def compose_answer(
    calls: list[dict[str, Any]], *, think: str | None = None, response: str | None = None, placeholder: bool = True
) -> str:
    """The tagged text of an answer that came in parts.  ``placeholder``: ToolRL's sentence for a missing thought."""
    parts = [f"<think> {think or PLACEHOLDER_THOUGHT} </think>"] if think or placeholder else []
    if calls:
        parts.append("\n".join(["<tool_call>", *(dumps(call) for call in calls), "</tool_call>"]))
    if response is not None:
        parts.append(f"<response> {response} </response>")
    if not calls and response is None:
        raise RowError("the reference answer has neither tool calls nor a response")
    return "\n".join(parts)


def leading_thought(text: str) -> tuple[str | None, str]:
    """``<think> ... </think>`` at the beginning of a message's content, and the rest.

    A thought that the template opened has its closing tag only.
    """
    opened = re.match(r"\s*(?:<think>)?(.*?)</think>", text, re.DOTALL)
    if opened is None or "<tool_call>" in opened[1] or "<response>" in opened[1]:
        return None, text
    return opened[1].strip() or None, text[opened.end() :].lstrip()


def with_thought(text: str, think: Any) -> str:
    """Tagged text with the thought that stood beside it, where it has none itself."""
    if not isinstance(think, str) or not think.strip() or "<think>" in text:
        return text
    return f"<think> {think.strip()} </think>\n{text}"


_TAGS = re.compile(r"</?(think|tool_call|response)>")


def without_tags(thought: str) -> str:
    """A thought that mentions tags by their names only: the published reward takes the first tag anywhere for one."""
    return _TAGS.sub(r"\1", thought)


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
