"""System messages: ToolRL's constant text, tool lists written in its form, and the compact style.

``original`` keeps every message as it came.  ``compact`` is for toy models on a CPU: it drops the constant blocks
"Steps for Each Turn", "Output Format" and "Important Notes" (about 400 tokens that say the same in every row) and
shortens the two constant headings; role sentence, tools and dialogue are untouched.  ``slim`` goes further, for models
of a few million parameters: the role sentence goes too, and each tool is one line with its name, its parameters' names
and types, and its description; defaults and the descriptions of parameters are lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

__all__ = [
    "HISTORY_HEADING",
    "INSTRUCTIONS",
    "ROLE_SENTENCE",
    "STYLES",
    "TOOLS_HEADING",
    "apply_style",
    "compact",
    "slim",
    "write_tools",
]

STYLES = ("original", "compact", "slim")
ROLE_SENTENCE = (
    "You are a helpful multi-turn dialogue assistant capable of leveraging tool calls to solve user tasks "
    "and provide structured chat responses."
)
TOOLS_HEADING = "**Available Tools**\nIn your response, you can use the following tools:\n"
HISTORY_HEADING = "**Dialogue Records History**\n"
# Identical in every row of rlla and API-Bank.
INSTRUCTIONS = """**Steps for Each Turn**
1. **Think:** Recall relevant context and analyze the current user goal.
2. **Decide on Tool Usage:** If a tool is needed, specify the tool and its parameters.
3. **Respond Appropriately:** If a response is needed, generate one while maintaining consistency across user queries.

**Output Format**
```plaintext
<think> Your thoughts and reasoning </think>
<tool_call>
{"name": "Tool name", "parameters": {"Parameter name": "Parameter content", "... ...": "... ..."}}
{"name": "... ...", "parameters": {"... ...": "... ...", "... ...": "... ..."}}
...
</tool_call>
<response> AI's final response </response>
```

**Important Notes**
1. You must always include the `<think>` field to outline your reasoning. Provide at least one of `<tool_call>` or \
`<response>`. Decide whether to use `<tool_call>` (possibly multiple times), `<response>`, or both.
2. You can invoke multiple tool calls simultaneously in the `<tool_call>` fields. Each tool call should be a JSON \
object with a "name" field and an "parameters" field containing a dictionary of parameters. If no parameters are \
needed, leave the "parameters" field an empty dictionary.
3. Refer to the previous dialogue records in the history, including the user's queries, previous `<tool_call>`, \
`<response>`, and any tool feedback noted as `<obs>` (if exists)."""


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_tools(role: str, tools: Sequence[dict[str, Any]]) -> str:
    """A system message in ToolRL's form."""
    entries = []
    for number, tool in enumerate(tools, start=1):
        parameters = tool["parameters"] if isinstance(tool["parameters"], str) else _dumps(tool["parameters"])
        entries.append(f"{number}. Name: {tool['name']}\nDescription: {tool['description']}\nParameters: {parameters}")
    return f"{role}\n\n{TOOLS_HEADING}" + "\n".join(entries) + f"\n\n{INSTRUCTIONS}"


def compact(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The compact style; text it does not know stays as it came."""
    return [{**message, "content": _compact_text(message)} for message in messages]


def _compact_text(message: dict[str, str]) -> str:
    text = message["content"]
    if message["role"] == "user":
        return text.removeprefix(HISTORY_HEADING)
    if message["role"] != "system":
        return text
    head, found, tail = text.partition(INSTRUCTIONS)
    if found and not tail.strip():
        text = head.rstrip()
    return text.replace(TOOLS_HEADING, "Tools:\n", 1)


_TOOL_ENTRY = re.compile(r"^\d+\. Name: (.*)\nDescription: ((?:.*\n)*?)Parameters: (.*)$", re.MULTILINE)


def slim(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The slim style; a tool list that it cannot read stays in the compact style."""
    return [
        {**message, "content": _slim_tools(message["content"]) if message["role"] == "system" else message["content"]}
        for message in compact(messages)
    ]


def _slim_tools(text: str) -> str:
    text = text.removeprefix(f"{ROLE_SENTENCE}\n\n")
    return _TOOL_ENTRY.sub(_slim_tool, text)


def _slim_tool(entry: re.Match[str]) -> str:
    name, description, parameters = entry.groups()
    try:
        fields = json.loads(parameters)
        if isinstance(fields.get("properties"), dict) and isinstance(fields.get("type"), str):
            fields = fields["properties"]  # a JSON schema
        types = {key: str(field["type"]) if isinstance(field, dict) else str(field) for key, field in fields.items()}
    except (ValueError, KeyError, AttributeError, RecursionError):
        return entry.group()
    return f"{_dumps({'name': name, 'parameters': types})} {description.strip()}"


def apply_style(messages: Sequence[dict[str, str]], style: str) -> list[dict[str, str]]:
    """Messages in one of :data:`STYLES`."""
    if style == "compact":
        return compact(messages)
    if style == "slim":
        return slim(messages)
    if style != "original":
        raise ValueError(f"unknown prompt style {style!r}, expected one of {', '.join(STYLES)}")
    return list(messages)
