"""An example as a chat template of a model's own dialect takes it: plain messages, calls as calls, tools as tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_tools import answers
from data_tools.conversation import Turn
from data_tools.errors import RowError
from data_tools.examples import Example
from data_tools.tool_lists import TOOL_LIST
from megatron_rest.regions import Dialect, ToolCallError

__all__ = ["asks_for_tags", "native_answer", "native_ground_truth", "native_messages", "native_tools"]


def asks_for_tags(example: Example) -> bool:
    """Whether the row's own system message asks for ToolRL's form."""
    system = example.system
    return "<tool_call>" in system and ("<response>" in system or TOOL_LIST in system)


def native_messages(example: Example) -> list[dict[str, Any]]:
    """The conversation, calls of earlier turns as ``tool_calls``, thoughts as ``reasoning_content``."""
    system = example.system.partition(TOOL_LIST)[0].rstrip()
    return [*([{"role": "system", "content": system}] if system else []), *map(_native, example.turns)]


def _native(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.role == "tool" and turn.name:
        message["name"] = turn.name
    if turn.thought and turn.thought != answers.PLACEHOLDER_THOUGHT:
        message["reasoning_content"] = turn.thought
    if turn.calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call["name"], "arguments": call["parameters"]}}
            for call in turn.calls
        ]
    return message


def native_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The row's tools as functions with JSON schemas; None where there are none."""
    return [
        {"type": "function", "function": {**tool, "parameters": _schema(tool["parameters"])}} for tool in tools
    ] or None


def _schema(parameters: Any) -> Any:
    """ToolRL lists the parameters themselves."""
    if not isinstance(parameters, dict) or parameters.get("type") == "object" or "properties" in parameters:
        return parameters
    return {"type": "object", "properties": parameters}


def native_ground_truth(example: Example) -> str:
    """The reference in tags, which is what rewards compare with, without a thought that nobody had."""
    think = None if example.think == answers.PLACEHOLDER_THOUGHT else example.think
    return answers.compose_answer(example.calls, think=think, response=example.response, placeholder=False)


def native_answer(example: Example, dialect: Dialect) -> str:
    """The reference as a model of the dialect writes it.  RowError for what it cannot write."""
    think = None if example.think == answers.PLACEHOLDER_THOUGHT else example.think
    try:
        return dialect.write(
            [(call["name"], call["parameters"]) for call in example.calls], thought=think, response=example.response
        )
    except ToolCallError as error:
        raise RowError(f"the reference answer cannot be written in {dialect.name}: {error}") from error
