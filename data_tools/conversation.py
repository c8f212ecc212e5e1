"""The one form between reading and writing: a conversation of turns, and its tools.

Every layout is read into it (:mod:`data_tools.layouts`), prompts and references are written from it
(:mod:`data_tools.examples`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from data_tools import answers
from data_tools.call_texts import leading_thought, read_text
from data_tools.calls import Call, holds_calls, read_call, read_calls
from data_tools.errors import RowError
from data_tools.tool_lists import Tool
from data_tools.values import dumps, parsed, with_pairs

CALL = "call"  # a role of its own in some sets: the message's text is the assistant's call
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "ai", "agent"),
    "tool": (
        *("tool", "observation", "function", "tool_response", "function_response", "tool_result", "function_result"),
        *("ipython", "environment", "tool_output", "function_call_output", "tool_call_output"),
    ),
    CALL: ("function_call", "tool_call", "tool_calls", "call"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text", "parts")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_CALL_KEYS = ("tool_calls", "function_call", "function_calls", "tool_call", "toolCalls", "functionCall", "calls")
_ID_KEYS = ("tool_call_id", "tool_use_id", "call_id")
_KNOWN_KEYS = {*_ROLE_KEYS, *_CONTENT_KEYS, *THOUGHT_KEYS, *_ID_KEYS, "name", "id", "type", "tools", "functions"}
_RESULT_PARTS = ("functionResponse", "function_response")
_TEXT_PARTS = ("text", "input_text", "output_text")
_TOOL_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
_PERHAPS = "?"  # an `id` of a result may be its call's (tau2) or the message's own
_STOP = re.compile(r"\s*###(?:STOP|TRANSFER|OUT-OF-SCOPE)###\s*")  # tau-bench's simulated users end with it


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says before the other does; consecutive messages of an assistant are one turn."""

    role: str  # system, user, assistant, tool
    text: str = ""
    thought: str | None = None
    calls: tuple[Call, ...] = ()
    call_ids: tuple[str, ...] = ()
    name: str = ""  # of the tool whose result it is
    call_id: str = ""
    written: str = ""  # an assistant's turn that came in ToolRL's tags, as it came


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A prompt and its reference; a row has one, or one for every turn of its assistant."""

    system: str
    turns: tuple[Turn, ...]  # of the prompt, without leading system messages
    tools: list[Tool]
    reference: Turn
    notes: tuple[str, ...]  # what was guessed or left out
    problems: tuple[str, ...]  # what is suspicious


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageForm:
    """How a set spells its messages, beyond what is recognised."""

    keys: Mapping[str, str] = field(default_factory=dict)  # role, content -> the key that holds it
    roles: Mapping[str, str] = field(default_factory=dict)  # the set's role -> system, user, assistant, tool, call
    calls_in_text: str = "auto"


@dataclass(frozen=True, slots=True)
class Opening:
    """A conversation of which the leading system messages are read: the tools that the rest needs may be in them."""

    said: list[Turn]
    rest: list[Any]

    @property
    def system(self) -> str:
        """What they say."""
        return "\n\n".join(dict.fromkeys(turn.text for turn in self.said if turn.text.strip()))


def read_messages(value: Any, tools: list[Tool], form: MessageForm) -> list[Turn]:
    """Turns of a list of messages (or of its JSON text), or of one user text."""
    return read_on(opening_of(value, form), tools, form)


def read_on(opening: Opening, tools: list[Tool], form: MessageForm) -> list[Turn]:
    """All turns of a conversation whose opening is read."""
    turns: list[Turn] = []
    for turn in opening.said:
        _append(turns, turn)
    for message in opening.rest:
        read = [message] if isinstance(message, Turn) else _turns_of(_opened(message, form), tools, form)
        for turn in read:
            _append(turns, turn)
    for turn, following in pairwise(turns):
        if turn.role == "assistant" and not (turn.text.strip() or turn.calls or turn.written):
            what = "is a thought and nothing else" if turn.thought else "says nothing"
            raise RowError(f"an assistant's turn {what} before the {following.role}'s: was its end cut?")
    return _with_results_in_order(turns)


def opening_of(value: Any, form: MessageForm) -> Opening:
    """The system messages that a conversation begins with, read, and the messages behind them."""
    said: list[Turn] = []
    messages = _messages_of(value, form)
    for at, message in enumerate(messages):
        message = {} if isinstance(message, Turn) else _opened(message, form)
        if _known_role(message, form) != "system" or _item(message):
            return Opening(said, messages[at:])
        said += _turns_of(message, [], form)
    return Opening(said, [])


def _messages_of(value: Any, form: MessageForm) -> list[Any]:
    """The messages as they are stored; one turn where the conversation is a text."""
    if isinstance(value, str):
        found = parsed(value)
        if isinstance(found, str) or (isinstance(found, dict) and not _is_message(found, form)):
            return [user_turn(value)]
        value = found if isinstance(found, list) else [found]
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if isinstance(value, dict) and all(isinstance(item, list) for item in value.values()) and value:
        value = _rows_of(value)  # {"from": [...], "value": [...]}
    if not isinstance(value, list) or not value:
        raise RowError(
            f"the conversation is {'empty' if value == [] else type(value).__name__}, expected a list of messages"
        )
    if len(value) == 1 and isinstance(value[0], list):  # BFCL's and others' list of one conversation
        value = value[0]
    return value


def _rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    if len({len(column) for column in columns.values()}) != 1:
        raise RowError("the conversation is columns of different lengths")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _is_message(value: dict[str, Any], form: MessageForm) -> bool:
    return any(key in value for key in (*_ROLE_KEYS, *form.keys.values()))


def user_turn(text: Any) -> Turn:
    """What a user says, which must be something."""
    if not isinstance(text, str):
        raise RowError(f"the content of a user message is {type(text).__name__}, expected text")
    if not text.strip():
        raise RowError("a user message is empty")
    return Turn("user", text)


def _append(turns: list[Turn], turn: Turn) -> None:
    last = turns[-1] if turns else None
    if last is None or last.role != turn.role or turn.role not in ("assistant", "system"):
        turns.append(turn)
    elif turn.role == "system":
        turns[-1] = replace(last, text=f"{last.text}\n\n{turn.text}" if turn.text not in last.text else last.text)
    elif last.written or turn.written:
        raise RowError("two messages of the assistant follow each other, and one is in tags: which is meant?")
    else:
        turns[-1] = Turn(
            "assistant",
            "\n".join(text for text in (last.text, turn.text) if text),
            "\n".join(thought for thought in (last.thought, turn.thought) if thought) or None,
            last.calls + turn.calls,
            last.call_ids + turn.call_ids,
        )


def _opened(message: Any, form: MessageForm) -> dict[str, Any]:
    """A message as an object without nulls."""
    message = with_pairs(parsed(message, "a message"))
    if not isinstance(message, dict):
        raise RowError(f"a message is {type(message).__name__} ({str(message)[:40]!r}), expected an object with a role")
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message.get("message"), dict) and not _is_message(message, form):
        message = message["message"]
    return message


def _turns_of(message: dict[str, Any], tools: list[Tool], form: MessageForm) -> list[Turn]:
    if item := _item(message):  # of OpenAI's Responses API
        return item
    role = _role(message, form)
    content = _content(message, form)
    if role not in ("assistant", CALL) and (key := next((key for key in _CALL_KEYS if message.get(key)), "")):
        raise RowError(f"a message of the {role} makes calls ({key}), which only the assistant can")
    if role == CALL:
        return [_call_turn(message, content, tools, form)]
    if isinstance(content, list):
        return _turns_of_parts(message, role, content, tools, form)
    if role == "assistant":
        return [_assistant(message, _text(content, role), tools, form)]
    if role == "tool":
        return [_result(message, content)]
    if role == "user":
        return [user_turn(content if content is not None else "")]
    return [Turn(role, _text(content, role))]


def _said_role(message: dict[str, Any], form: MessageForm) -> Any:
    key = form.keys.get("role", "")
    return message.get(key) if key else next((message[k] for k in _ROLE_KEYS if k in message), None)


def _known_role(message: dict[str, Any], form: MessageForm) -> str | None:
    role = _said_role(message, form)
    if named := form.roles.get(str(role)):
        return named
    return _ROLE_OF.get(role.strip().lower().replace("-", "_").replace(" ", "_")) if isinstance(role, str) else None


def _role(message: dict[str, Any], form: MessageForm) -> str:
    known, role = _known_role(message, form), _said_role(message, form)
    if known is None:
        raise RowError(
            f"a message has role {str(role)[:40]!r}, expected one of {', '.join(ROLES)} or a synonym",
            f"name it in a --mapping file: `roles: {{{str(role)[:40]}: user}}`",
        )
    return known


def _content(message: dict[str, Any], form: MessageForm) -> Any:
    if key := form.keys.get("content"):
        return message.get(key)
    said = {key: message[key] for key in _CONTENT_KEYS if key in message}
    full = {key: value for key, value in said.items() if value not in ("", [])}
    if len(full) > 1 and any(value != next(iter(full.values())) for value in full.values()):
        raise RowError(f"a message says one thing under {' and another under '.join(full)}: which is meant?")
    return next(iter((full or said).values()), None)


def _text(content: Any, role: str) -> str:
    if content is None:
        return ""
    if not isinstance(content, str):
        raise RowError(f"the content of a {role} message is {type(content).__name__}, expected text")
    return content


def _result(message: dict[str, Any], content: Any) -> Turn:
    text = "" if content is None else content if isinstance(content, str) else dumps(content)
    wrapped = _TOOL_RESPONSE.fullmatch(text)
    if wrapped and "<tool_response>" not in wrapped[1]:
        text = wrapped[1]
    call_id = next((str(message[key]) for key in _ID_KEYS if key in message), "")
    return Turn(
        "tool", text, name=str(message.get("name", "")), call_id=call_id or _PERHAPS + str(message.get("id", ""))
    )


def _thought_beside(message: dict[str, Any]) -> str | None:
    for key in THOUGHT_KEYS:
        value = message.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if value is not None and not isinstance(value, (str, bool)):
            raise RowError(f"the {key} of a message is {type(value).__name__}, expected text")
    return None


def _call_turn(message: dict[str, Any], content: Any, tools: list[Tool], form: MessageForm) -> Turn:
    """A message whose role says that its text is a call."""
    thought, text = leading_thought(content) if isinstance(content, str) else (None, content)
    value = parsed(text)
    if isinstance(value, str):
        said = read_text(value, tools)
        if not said.calls:
            said = read_text(f"<tool_call>{value}</tool_call>", tools)
        calls, text = said.calls, said.text
    else:
        calls, text = read_calls(value), ""
    return Turn("assistant", text, _thought_beside(message) or thought, tuple(calls), ("",) * len(calls))


def _assistant(message: dict[str, Any], text: str, tools: list[Tool], form: MessageForm) -> Turn:
    calls, ids = _calls_beside(message, {tool["name"] for tool in tools})
    beside = _thought_beside(message)
    return assistant_turn(text, tools, form.calls_in_text, thought=beside, calls=calls, call_ids=ids)


def _calls_beside(message: dict[str, Any], names: set[str]) -> tuple[list[Call], tuple[str, ...]]:
    """Calls that a message has beside its text, with their ids; under a key that nobody knows they are refused."""
    found: dict[str, list[Any]] = {}
    for key, value in message.items():
        if key in _CALL_KEYS:
            raw = parsed(value or [], "the calls of a message")
            if raw := raw if isinstance(raw, list) else [raw]:
                found[key] = raw
        elif (
            key not in _KNOWN_KEYS
            and isinstance(value, (list, dict, str))
            and (holds_calls(value, names) or ("call" in key.lower() and _names_tools(value, names)))
        ):
            raise RowError(f"a message has calls under {key!r}", "an --adapter can rename it to tool_calls")
    read = {key: [read_call(item) for item in raw] for key, raw in found.items()}
    if not read:
        return [], ()
    [(key, calls), *others] = read.items()
    if any(other != calls for _, other in others):
        raise RowError(f"a message makes different calls under {' and '.join(read)}: which are meant?")
    items = [parsed(item) for item in found[key]]
    return calls, tuple(str(item.get("id") or "") if isinstance(item, dict) else "" for item in items)


def _names_tools(value: Any, names: Collection[str]) -> bool:
    """Whether a value is nothing but names of tools."""
    value = parsed(value)
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item in names for item in items)


def assistant_turn(
    text: str,
    tools: list[Tool],
    calls_in_text: str = "auto",
    *,
    thought: str | None = None,
    calls: Sequence[Call] = (),
    call_ids: tuple[str, ...] = (),
) -> Turn:
    """An assistant's text with what stood beside it."""
    if not calls and (tagged := tagged_turn(text, thought)):
        return tagged
    leading, rest = leading_thought(text)
    said = read_text(rest, tools, calls_in_text)
    if calls and said.calls:
        if list(calls) != said.calls:
            raise RowError(f"a message makes calls beside its text and other ones in it ({said.dialect})")
        said = replace(said, calls=[])
    inner, body = leading_thought(said.text)  # of a dialect whose thoughts have no tags
    found = "\n".join(part for part in (leading, inner) if part) or None
    return Turn(
        "assistant",
        body.strip() if (leading or said.calls) else body,
        thought or found,
        (*calls, *said.calls),
        call_ids or ("",) * (len(calls) + len(said.calls)),
    )


def tagged_turn(text: str, thought: str | None = None) -> Turn | None:
    """A turn in ToolRL's own form, which stays as it came; None for any other."""
    if "<response>" not in text and ("<tool_call>" not in text or '"arguments"' in text):
        return None
    try:
        read = answers.parse_answer(text)
    except RowError:
        return None
    if not answers.is_in_toolrls_form(text):
        return None
    if thought and "<think>" not in text:
        text = f"<think> {thought} </think>\n{text}"
    return Turn("assistant", read.response or "", read.think or thought, tuple(read.calls), written=text)


# --- parts and items -----------------------------------------------------------------------------------------------


def _turns_of_parts(
    message: dict[str, Any], role: str, parts: list[Any], tools: list[Tool], form: MessageForm
) -> list[Turn]:
    """A message in parts: text, thoughts, calls and results (OpenAI, Anthropic)."""
    text, thoughts, calls, ids, results = "", [], [], [], []
    for part in parts:
        part = parsed(part) if not isinstance(part, str) else {"type": "text", "text": part}
        kind = _kind(part)
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            if part.get("thought") is True:
                thoughts.append(part["text"].strip())
            else:
                text += part["text"]
        elif kind in ("thinking", "reasoning") and role == "assistant":
            thoughts.append(str(part.get("thinking") or part.get("text") or part.get("reasoning") or "").strip())
        elif kind in ("tool_use", "tool_call", "function_call", "functionCall") and role == "assistant":
            calls.append(read_call(part))
            ids.append(str(part.get("id") or part.get("call_id") or ""))
        elif kind == "tool_result":
            results.append(_result(part, _plain(part.get("content"))))
        elif kind in _RESULT_PARTS and isinstance(part.get(kind), dict):
            results.append(_result(part[kind], part[kind].get("response")))
        elif role == "tool":
            return [_result(message, parts)]
        else:
            what = "images are not supported" if "image" in kind else f"parts of type {kind!r} are not known"
            raise RowError(f"the content of a {role} message is not text only: {what}")
    if role == "assistant":
        beside = _thought_beside(message) or "\n".join(filter(None, thoughts)) or None
        made = _assistant({**message, "reasoning_content": beside} if beside else message, text, tools, form)
        return [replace(made, calls=(*made.calls, *calls), call_ids=(*made.call_ids, *ids))]
    if role == "tool" and not results:
        return [_result(message, text)]
    if results and text.strip():
        return [*results, user_turn(text)]
    return results or [user_turn(text) if role == "user" else Turn(role, text)]


def _kind(part: Any) -> str:
    """What a part is, by its type or (Gemini's) by its only key."""
    if not isinstance(part, dict):
        return type(part).__name__
    kinds = ("text", "functionCall", "function_call", *_RESULT_PARTS)
    return str(part.get("type") or next((key for key in kinds if part.get(key) is not None), ""))


def _plain(content: Any) -> Any:
    """Text parts as text."""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    return content


def _item(message: dict[str, Any]) -> list[Turn]:
    kind = message.get("type")
    if kind == "function_call":
        return [Turn("assistant", calls=(read_call(message),), call_ids=(str(message.get("call_id", "")),))]
    if kind == "function_call_output":
        return [_result(message, _plain(message.get("output")))]
    if kind == "reasoning":
        thought = _plain(message.get("summary") or message.get("content") or "")
        return [Turn("assistant", thought=thought if isinstance(thought, str) and thought.strip() else None)]
    return []


# --- order and ends -----------------------------------------------------------------------------------------------


def _with_results_in_order(turns: list[Turn]) -> list[Turn]:
    """Results of parallel calls stand in the calls' order where ids tell, and know their tool's name."""
    ordered = list(turns)
    for at, turn in enumerate(turns):
        ids = turn.call_ids
        if not turn.calls or not all(ids) or len(set(ids)) < len(ids):
            continue
        end = at + 1
        while end < len(turns) and turns[end].role == "tool":
            end += 1
        results = turns[at + 1 : end]
        found = [result.call_id.removeprefix(_PERHAPS) for result in results]
        if not found or set(found) - set(ids) or len(set(found)) < len(found):
            if any(result.call_id and not result.call_id.startswith(_PERHAPS) for result in results):
                raise RowError(
                    f"the results' ids {', '.join(found)[:80]} are not those of the calls, {', '.join(ids)[:80]}"
                )
            continue
        names = {i: call["name"] for i, call in zip(ids, turn.calls, strict=True)}
        pairs = sorted(zip(found, results, strict=True), key=lambda pair: ids.index(pair[0]))
        ordered[at + 1 : end] = [replace(result, name=result.name or names[i], call_id=i) for i, result in pairs]
    return ordered


def without_stop(turns: list[Turn]) -> list[Turn]:
    """A trajectory without the simulated user's last word."""
    while turns and turns[-1].role == "user" and _STOP.fullmatch(turns[-1].text):
        turns = turns[:-1]
    return turns
