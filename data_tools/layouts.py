"""One normaliser for the column layouts that tool-use data comes in.

| layout    | columns                                    | reference answer                                |
|-----------|--------------------------------------------|-------------------------------------------------|
| verl      | prompt, reward_model.ground_truth          | tagged text                                     |
| messages  | messages [, tools]                         | last assistant message (tool_calls or text)     |
| rlla_sft  | instruction, input, output                 | tagged text                                     |
| api_bank  | system, user, answer                       | one call, or a list of calls                    |
| io        | input, output [, tools]                    | tagged text                                     |

Anything else by :class:`Columns`: dotted paths from column names to what they mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools import answers
from data_tools.errors import DataError, RowError
from megatron_rest.data import prompt_style

Message = dict[str, str]
Row = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # of an assistant's message, by server and by library


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where an own format keeps its parts; every value is a column name or a dotted path (``meta.answer``)."""

    system: str = ""
    """System message."""
    user: str = ""
    """User message."""
    messages: str = ""
    """List of {role, content}, instead of system and user; without ``answer`` its last message is the reference."""
    tools: str = ""
    """List of tools, or its JSON text; written into the system message unless that has a tool list already."""
    answer: str = ""
    """Reference answer as tagged text."""
    calls: str = ""
    """Reference tool calls: a list of {name, parameters | arguments}, or its JSON text."""
    response: str = ""
    """Reference text for the user."""
    think: str = ""
    """Reference thought."""

    @classmethod
    def from_pairs(cls, pairs: dict[str, Any]) -> Columns:
        """From a mapping file or ``--column`` options; an unknown name is an error that names the nearest."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name, path in pairs.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise DataError(
                    f"column mapping: unknown name {name!r}, "
                    + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
                )
            if not isinstance(path, str) or not path:
                raise DataError(f"column mapping: {name} must name a column, got {path!r}")
        columns = cls(**pairs)
        if not (columns.messages or columns.user):
            raise DataError("column mapping: say where the prompt is (user=... or messages=...)")
        if not (columns.messages or columns.answer or columns.calls or columns.response):
            raise DataError("column mapping: say where the reference answer is (answer=..., calls=... or response=...)")
        return columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row, whatever layout it came in."""

    messages: list[Message]  # tools written into the system message in ToolRL's form
    ground_truth: str  # tagged reference answer
    calls: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    think: str | None
    response: str | None
    calls_json: str
    tools_json: str
    prompt_id: str  # hash of prompt and reference as they came: the same for every tokenizer and prompt style
    own_messages: list[Message] = dataclasses.field(default_factory=list, compare=False)  # as they came


def load_columns(path: str | None, pairs: Sequence[str]) -> Columns | None:
    """Columns from a YAML file and ``name=column`` options (the options win); None if neither is given."""
    values: dict[str, Any] = {}
    if path:
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"--map {path}: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"--map {path} must hold a mapping, for example `user: question`")
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals:
            raise DataError(f"--column {pair!r} is not of the form NAME=COLUMN, for example user=question")
        values[name] = column
    return Columns.from_pairs(values) if values else None


def normalise(row: Any, columns: Columns | None = None) -> Example:
    """Bring a row into one form; raises :class:`RowError` with the reason where it cannot be used."""
    if not isinstance(row, dict):
        raise RowError(f"the row is {type(row).__name__}, expected an object with columns")
    try:
        return _mapped(row, columns) if columns else _recognise(row)
    except RowError:
        raise
    except UnicodeEncodeError as error:  # JSON can smuggle in half a surrogate pair, which no UTF-8 file can hold
        raise RowError(f"the text is not valid Unicode: {error.reason}") from error
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:  # shapes nobody thought of
        raise RowError(f"the row has an unexpected shape ({type(error).__name__}: {error})") from error


def _recognise(row: Row) -> Example:
    if "prompt" in row and isinstance(row.get("reward_model"), dict):
        return _tagged(_messages(row["prompt"]), _text(row["reward_model"], "ground_truth"), row.get("tools"))
    if "messages" in row:
        return _conversation(row["messages"], row.get("tools"))
    if {"instruction", "input", "output"} <= row.keys():
        return _tagged(_pair(row["instruction"], row["input"]), _text(row, "output"), row.get("tools"))
    if {"system", "user", "answer"} <= row.keys():
        calls = row["answer"]
        return _parts(_pair(row["system"], row["user"]), calls=calls, tools=row.get("tools"))
    if {"input", "output"} <= row.keys():
        return _tagged(_messages(row["input"]), _text(row, "output"), row.get("tools"))
    raise RowError(
        f"no known layout has the columns {', '.join(sorted(map(str, row))[:12])}: "
        "name them with --column or --map (docs/data.md)"
    )


def _mapped(row: Row, columns: Columns) -> Example:
    def get(path: str) -> Any:
        value: Any = row
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                raise RowError(
                    f"the mapped column {path!r} is missing; the row has {', '.join(sorted(map(str, row))[:12])}"
                )
            value = value[key]
        return value

    tools = get(columns.tools) if columns.tools else None
    if columns.messages and not (columns.answer or columns.calls or columns.response):
        return _conversation(get(columns.messages), tools)
    if columns.messages:
        messages = _messages(get(columns.messages))
    else:
        messages = _pair(get(columns.system) if columns.system else None, get(columns.user))
    if columns.answer:
        text = get(columns.answer)
        if not isinstance(text, str):
            raise RowError(f"the mapped column {columns.answer!r} is {type(text).__name__}, expected text")
        return _tagged(messages, text, tools)
    return _parts(
        messages,
        calls=get(columns.calls) if columns.calls else None,
        response=get(columns.response) if columns.response else None,
        think=get(columns.think) if columns.think else None,
        tools=tools,
    )


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{key} is {'empty' if isinstance(value, str) else type(value).__name__}, expected text")
    return value


def _pair(system: Any, user: Any) -> list[Message]:
    messages = [{"role": "user", "content": _content(user, "user")}]
    if system is not None and system != "":
        messages.insert(0, {"role": "system", "content": _content(system, "system")})
    return messages


def _messages(value: Any) -> list[Message]:
    """A list of messages, or one user text."""
    if isinstance(value, str):
        return _pair(None, value)
    if not isinstance(value, list) or not value:
        raise RowError(
            f"the conversation is {'empty' if value == [] else type(value).__name__}, expected a list of messages"
        )
    return [_message(message) for message in value]


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise RowError(f"a message has role {str(role)[:40]!r}, expected one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if message["role"] == "assistant" and calls:
        return {"role": "assistant", "content": _assistant(message).ground_truth}
    return {"role": message["role"], "content": _content(message.get("content"), message["role"])}


def _content(value: Any, role: str) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise RowError(f"the content of a {role} message is {type(value).__name__}, expected text")
    if role == "user" and not value.strip():
        raise RowError("a user message is empty")
    return value


def _conversation(value: Any, tools: Any) -> Example:
    if not isinstance(value, list) or len(value) < 2:
        raise RowError("the conversation needs at least a prompt and a reference answer")
    last = value[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise RowError("the last message is not from the assistant: there is no reference answer")
    reference = _assistant(last)
    return _build(_messages(value[:-1]), reference.ground_truth, tools)


def _assistant(message: Row) -> Example:
    """A reference message: tagged text as it is; otherwise its parts."""
    content = message.get("content")
    text = _content(content, "assistant") if content is not None else ""
    calls = message.get("tool_calls")
    think = next((message[key] for key in _THOUGHT_KEYS if message.get(key)), None)
    if not calls and ("<tool_call>" in text or "<response>" in text):
        return _build([], answers.with_thought(text, think), None)
    leading, text = answers.leading_thought(text)
    return _parts(
        [],
        calls=calls,
        response=text if text.strip() else None,
        think=think or leading,
        tools=None,
    )


def _tagged(messages: list[Message], text: str, tools: Any) -> Example:
    return _build(messages, text, tools)


def _parts(
    messages: list[Message], *, calls: Any = None, response: Any = None, think: Any = None, tools: Any = None
) -> Example:
    if isinstance(calls, str):
        try:
            calls = answers.loads(calls)
        except (ValueError, RecursionError) as error:
            raise RowError(f"the reference calls are not JSON: {error}") from error
    if isinstance(calls, dict):
        calls = [calls]
    if calls is not None and not isinstance(calls, list):
        raise RowError(f"the reference calls are {type(calls).__name__}, expected a list")
    for name, value in (("response", response), ("think", think)):
        if value is not None and not isinstance(value, str):
            raise RowError(f"the reference {name} is {type(value).__name__}, expected text")
    checked = [answers.check_call(call) for call in calls or []]
    return _build(messages, answers.compose_answer(checked, think=think, response=response or None), tools)


def _build(messages: list[Message], ground_truth: str, tools: Any) -> Example:
    if messages and messages[-1]["role"] == "assistant":
        raise RowError("the prompt ends with an assistant message: nothing is left to answer")
    answer = answers.parse_answer(ground_truth)
    own_messages = messages
    listed = answers.check_tools(tools)
    tools_json = _json_text(listed)  # before they are written anywhere: what JSON cannot hold is refused
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    if listed and (system is None or "**Available Tools**" not in system):
        text = prompt_style.write_tools(system or prompt_style.ROLE_SENTENCE, listed)
        messages = [{"role": "system", "content": text}, *messages[0 if system is None else 1 :]]
    elif not listed and system is not None:
        listed = answers.parse_tools(system)
        tools_json = _json_text(listed)
    return Example(
        messages=messages,
        own_messages=own_messages,
        ground_truth=ground_truth,
        calls=answer.calls,
        tools=listed,
        think=answer.think,
        response=answer.response,
        calls_json=_json_text(answer.calls),
        tools_json=tools_json,
        prompt_id=_content_hash(messages, ground_truth),
    )


def _json_text(value: Any) -> str:
    text = answers.dumps(value)
    text.encode()
    return text


def _content_hash(messages: list[Message], ground_truth: str) -> str:
    digest = hashlib.sha256()
    for part in (*(text for m in messages for text in (m["role"], m["content"])), ground_truth):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]
