"""Rows to examples: a row is read into a conversation, and every reference of it becomes one prompt and one answer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from data_tools import answers
from data_tools.adapter import adapted
from data_tools.calls import Call, holds_calls, read_calls, without_meaningless_nulls
from data_tools.checks import UNREAD, problems_of
from data_tools.columns import FIRST_STEPS, REFERENCES, TOOL_PATHS, Columns, Row, look_up, missing
from data_tools.conversation import (
    Conversation,
    Opening,
    Turn,
    assistant_turn,
    opening_of,
    read_messages,
    read_on,
    user_turn,
    without_stop,
)
from data_tools.errors import DataError, RowError
from data_tools.layouts import LAYOUTS, OWN, Layout, layout_of
from data_tools.metadata import metadata_of
from data_tools.tool_lists import TOOL_LIST, Tool, read_tools, tools_of_system, without_list
from data_tools.values import dumps, parsed
from megatron_rest.data import prompt_style

Message = dict[str, str]
NO_CALL_RESPONSE = "None of the available tools is needed for this."
_EMPTY = "an empty list of calls was read as: to call nothing is right (a placeholder is the response)"
_SPOKEN = "text beside the calls of a reference was left out (text_with_calls: keep in a --mapping keeps it)"
_EARLIER = "earlier turns make calls that are no reference: --reference each makes a row of every turn"
_RELISTED = "the system message listed tools or asked for calls in another form: replaced by the dialect's"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How rows are read."""

    columns: Columns | None = None
    """Places that a mapping names; None = recognise the layout."""
    layout: str = ""
    """Name of a layout of the table; empty = by content."""
    reference: str = ""
    """last, each, last-call or a column; empty = as the layout says."""
    adapter: str = ""
    """FILE.py:FUNCTION that rows go through first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One prompt and its reference, whatever layout they came in."""

    messages: list[Message]  # tools written into the system message in ToolRL's form
    ground_truth: str  # tagged reference answer
    calls: list[Call]
    tools: list[Tool]
    think: str | None
    response: str | None
    calls_json: str
    tools_json: str
    prompt_id: str  # hash of prompt and reference as they came: the same for every tokenizer and prompt style
    system: str = field(default="", compare=False)
    turns: tuple[Turn, ...] = field(default=(), compare=False)  # of the prompt
    layout: str = field(default="", compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)  # what was guessed or left out
    problems: tuple[str, ...] = field(default=(), compare=False)  # of the self-check
    metadata_json: str = field(default="{}", compare=False)  # columns of the row that nothing else is from


_AS_IT_IS = Reading()


def examples_of(row: Any, reading: Reading = _AS_IT_IS) -> list[Example]:
    """The examples of a row, most often one; raises :class:`RowError` with the reason where it cannot be used."""
    if not isinstance(row, dict):
        raise RowError(f"the row is {type(row).__name__}, expected an object with columns")
    try:
        rows = adapted(row, reading.adapter) if reading.adapter else [row]
        return [example for made in rows for example in _examples(made, reading)]
    except (RowError, DataError):
        raise
    except UnicodeEncodeError as error:  # JSON can smuggle in half a surrogate pair, which no UTF-8 file can hold
        raise RowError(f"the text is not valid Unicode: {error.reason}") from error
    except (TypeError, KeyError, AttributeError, ValueError, IndexError, RecursionError) as error:  # nobody thought of
        raise RowError(f"the row has an unexpected shape ({type(error).__name__}: {error})") from error


def normalise(row: Any, reading: Reading = _AS_IT_IS) -> Example:
    """The first example of a row."""
    found = examples_of(row, reading)
    if not found:
        raise RowError("the adapter leaves the row out")
    return found[0]


def _examples(row: Row, reading: Reading) -> Iterator[Example]:
    columns = reading.columns
    if columns is not None and columns.has_prompt:
        layout = Layout(name=OWN, who="", columns="", reference="", is_it=lambda _: True, where=columns)
    else:
        layout = layout_of(row, reading.layout)
        if columns is not None:
            layout = replace(layout, where=_over(layout.where, columns))
    if layout.refusal:
        raise RowError(layout.refusal)
    if layout is LAYOUTS[0]:  # a row of an earlier quarantine
        for made in layout.reshape(row) if layout.reshape else ():
            yield from _examples(made, reading)
        return
    wanted = reading.reference if reading.reference not in REFERENCES else ""
    metadata, note = metadata_of(row, layout.where, read=layout.read, wanted=wanted)
    for shaped in layout.reshape(row) if layout.reshape else [row]:
        for conversation in _conversations(shaped, layout, reading.reference):
            yield _build(conversation, layout.name, metadata, [note] if note else [])


def _over(where: Columns, own: Columns) -> Columns:
    """A layout's places with those that a mapping names instead."""
    plain = Columns()
    changed = {
        entry.name: getattr(own, entry.name)
        for entry in dataclasses.fields(Columns)
        if getattr(own, entry.name) != getattr(plain, entry.name)
    }
    if changed.keys() & {"answer", "calls", "response"}:
        changed = {"answer": (), "calls": (), "response": (), **changed}
    return replace(where, **changed)


def _conversations(row: Row, layout: Layout, wanted: str) -> Iterator[Conversation]:
    """One for every reference that is asked for."""
    where = layout.where
    tools = _tools(row, where)
    given = look_up(row, where.system)
    if given is not None and not isinstance(given, str):
        raise RowError(f"the system message is {type(given).__name__}, expected text")
    opening = opening_of(_raw_messages(row, where), where.form) if where.messages else None
    first_said = opening.system if opening else ""
    system = "\n\n".join(dict.fromkeys(text for text in (given or "", first_said) if text.strip()))
    notes: list[str] = []
    if tools:
        plain = without_list(system)
    else:
        tools, plain = tools_of_system(system)
    if plain != system:
        notes.append(_RELISTED)
    turns = [turn for turn in _turns(row, opening, tools, where) if turn.text or turn.role != "system"]
    while turns and turns[0].role == "system":
        turns = turns[1:]
    column = wanted if wanted and wanted not in REFERENCES else ""
    column = column or ("" if where.reference in REFERENCES else where.reference)
    first = 0
    if (where.answer or where.calls or where.response) and not (wanted and wanted not in REFERENCES):
        reference, more = _of_parts(row, layout, tools)
        turns = [*turns, reference]
        first, notes = len(turns) - 1, [*notes, *more]
        if turns[:-1] and turns[-2].role == "assistant":
            raise RowError("the prompt ends with an assistant message: nothing is left to answer")
    elif column:
        first = len(turns)
        turns = [*turns, *_of_column(row, column, layout, tools)]
        if first and turns[first - 1].role == "assistant":
            raise RowError("the prompt ends with an assistant message: nothing is left to answer")
    turns = [_without_nulls(turn, tools, where.nulls) for turn in without_stop(turns)]
    how = wanted if wanted in REFERENCES else where.reference if where.reference in REFERENCES else "last"
    for at in _chosen(turns, how, first):
        reference, extra = turns[at], list(notes)
        if reference.calls and reference.text.strip() and not reference.written and where.text_with_calls == "drop":
            reference = replace(reference, text="")
            extra.append(_SPOKEN)
        if how == "last" and not reference.calls and any(turn.calls for turn in turns[first:at]):
            extra.append(_EARLIER)
        problems = problems_of(list(reference.calls), tools)
        if not any(turn.calls for turn in turns):
            problems += [f"{UNREAD}: {name}" for name in _unread(row, where)]
        yield Conversation(
            system=plain,
            turns=tuple(turns[:at]),
            tools=tools,
            reference=reference,
            notes=tuple(extra),
            problems=tuple(problems),
        )


def _unread(row: Row, where: Columns) -> list[str]:
    """Columns that no part of the layout is read from, and that hold calls."""
    return [
        name
        for name, value in row.items()
        if name not in where.first_steps and isinstance(value, (str, list, dict)) and holds_calls(value)
    ]


def _tools(row: Row, where: Columns) -> list[Tool]:
    if where.tools != TOOL_PATHS:  # as a mapping says; a row may lack them
        return read_tools(look_up(row, where.tools))
    found = None
    for path in TOOL_PATHS if row.keys() & FIRST_STEPS else ():
        value = look_up(row, (path,))
        if value is None:
            continue
        found = value if found is None else found
        if isinstance(parsed(value), (list, dict)) and parsed(value):
            return read_tools(value)
    return read_tools(found)


def _raw_messages(row: Row, where: Columns) -> Any:
    value = look_up(row, where.messages)
    if value is None:
        raise (
            missing(row, "messages", where.messages)
            if where.messages[0] not in row
            else RowError("the conversation is NoneType, expected a list of messages")
        )
    return value


def _turns(row: Row, opening: Opening | None, tools: list[Tool], where: Columns) -> list[Turn]:
    if opening is not None:
        return read_on(opening, tools, where.form)
    text = look_up(row, where.user)
    if text is None and not any(path in row for path in where.user):
        raise missing(row, "user", where.user)
    more = look_up(row, where.input)
    if more is not None and not isinstance(more, str):
        raise RowError(f"the input is {type(more).__name__}, expected text")
    if isinstance(text, str) and more and more.strip():
        text = f"{text}\n{more}" if text.strip() else more
    return [*_history(look_up(row, where.history), tools, where), user_turn(text)]


def _history(value: Any, tools: list[Tool], where: Columns) -> list[Turn]:
    value = parsed(value)
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return [turn for said, answer in value for turn in (user_turn(said), assistant_turn(answer, tools))]
    return read_messages(value, tools, where.form)


def _of_parts(row: Row, layout: Layout, tools: list[Tool]) -> tuple[Turn, list[str]]:
    """The reference of columns of its own."""
    where = layout.where
    think = look_up(row, where.think)
    response = look_up(row, where.response)
    for name, value in (("think", think), ("response", response)):
        if value is not None and not isinstance(value, str):
            raise RowError(f"the reference {name} is {type(value).__name__}, expected text")
    answer, calls = look_up(row, where.answer), look_up(row, where.calls)
    if where.answer and answer is None and calls is None and response is None:
        raise _no_answer(row, "answer", where.answer)
    if where.calls and calls is None and response is None and answer is None:
        raise _no_answer(row, "calls", where.calls)
    if answer is not None:
        turn = _of_answer(answer, where.answer, layout, tools)
        if turn is not None:
            return replace(turn, thought=turn.thought or think), []
        calls = answer
    if isinstance(calls, str) and not calls.strip() and not (response and response.strip()):
        raise RowError(f"{where.calls[0].rpartition('.')[2]} is empty text: no reference answer")
    made = read_calls(calls) if calls is not None and calls != "" else []
    if not made and not (response and response.strip()):
        if calls is None or where.empty_calls == "refuse":
            raise RowError(
                "the reference answer has neither tool calls nor a response",
                "`empty_calls: no-call` in a --mapping makes an empty list a reference" if calls is not None else "",
            )
        return Turn("assistant", NO_CALL_RESPONSE, think), [_EMPTY]
    turn = assistant_turn(response or "", tools, where.calls_in_text, thought=think, calls=made) if response else None
    return turn or Turn("assistant", "", think or None, tuple(made)), []


def _no_answer(row: Row, name: str, paths: tuple[str, ...]) -> RowError:
    if look_up(row, paths) is None and not any(path.split(".")[0] in row for path in paths):
        return missing(row, name, paths)
    last = paths[0].rpartition(".")[2]
    if name == "calls":
        return RowError(
            "the reference answer has neither tool calls nor a response",
            f"{last} is null: --column response=COLUMN says where its text is",
        )
    return RowError(f"{last} is NoneType, expected text")


def _of_answer(value: Any, paths: tuple[str, ...], layout: Layout, tools: list[Tool]) -> Turn | None:
    """A reference that is text, or a message; None where it is a list of calls."""
    name = paths[0].rpartition(".")[2]
    found = parsed(value)
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict) and "role" in found[0]:
        found = found[0]
    if isinstance(found, dict) and ("role" in found or "from" in found):
        turns = read_messages([found], tools, layout.where.form)
        if turns[-1].role != "assistant":
            raise RowError(f"{name} is a message of the {turns[-1].role}, expected the assistant's")
        return turns[-1]
    if (
        isinstance(found, list)
        and found
        and all(isinstance(item, str) for item in found)
        and not any(item.lstrip().startswith("{") for item in found)
    ):
        raise RowError(
            f"{name} is a list of texts, expected one reference answer", "give one with --column answer=PATH[0]"
        )
    if isinstance(found, (list, dict)):
        if (isinstance(found, dict) and not _is_calls(found)) or (layout.name == "rlla" and not isinstance(value, str)):
            raise RowError(f"{name} is {type(found).__name__}, expected text")
        return None
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} is {'empty' if isinstance(value, str) else type(value).__name__}, expected text")
    return _of_text(value, paths, layout, tools)


def _is_calls(value: dict[str, Any]) -> bool:
    return any(key in value for key in ("name", "function", "tool_calls", "tool_name", "tool"))


def _of_text(text: str, paths: tuple[str, ...], layout: Layout, tools: list[Tool]) -> Turn:
    try:
        read = answers.parse_answer(text)
        if answers.is_in_toolrls_form(text):
            return Turn("assistant", read.response or "", read.think, tuple(read.calls), written=text)
        return assistant_turn(text, tools, layout.where.calls_in_text)
    except RowError as error:
        try:
            turn = assistant_turn(text, tools, layout.where.calls_in_text)
        except RowError as other:
            raise (other if "looks like" in str(other) and "<tool_call>" not in text else error) from other
        if turn.calls or not (layout.tagged or layout.name == OWN) or "<response>" in text:
            return turn
        raise RowError(error.reason, f"if it is text for the user: --column response={paths[0]}") from error


def _of_column(row: Row, column: str, layout: Layout, tools: list[Tool]) -> list[Turn]:
    """The turns of a reference column: a message, messages, calls or text."""
    value = look_up(row, (column,))
    if value is None:
        raise missing(row, "reference", (column,))
    found = parsed(value)
    if isinstance(found, str):
        return [_of_text(found, (column,), replace(layout, tagged=False, name=""), tools)]
    items = found if isinstance(found, list) else [found]
    if all(
        isinstance(m := parsed(item), dict) and ("role" in m or "from" in m or ("type" in m and "function" not in m))
        for item in items
    ):
        turns = read_messages(items, tools, layout.where.form)
        if not turns or turns[0].role != "assistant" or not turns:
            turns = (
                [turn for turn in turns if turn.role == "assistant"][-1:] if layout.name == "trl-preference" else turns
            )
        return turns
    if not items:
        return [Turn("assistant", NO_CALL_RESPONSE)]
    return [Turn("assistant", "", None, tuple(read_calls(items)))]


def _without_nulls(turn: Turn, tools: list[Tool], nulls: str) -> Turn:
    if not turn.calls or turn.written:
        return turn
    return replace(turn, calls=tuple(without_meaningless_nulls(list(turn.calls), tools, nulls)))


def _chosen(turns: list[Turn], how: str, first: int) -> list[int]:
    """Which turns are references."""
    if len(turns) < 2:
        raise RowError("the conversation needs at least a prompt and a reference answer")
    own = [at for at in range(max(first, 1), len(turns)) if turns[at].role == "assistant"]
    own = [at for at in own if any(turn.role != "assistant" for turn in turns[:at])]
    if how == "each" and own:
        return own
    if how == "last-call":
        calling = [at for at in own if turns[at].calls]
        if not calling:
            raise RowError("no turn of the assistant makes a call", "--reference last takes the last one")
        return calling[-1:]
    if turns[-1].role != "assistant" or not own:
        remedy = "--reference each (or last-call) takes earlier turns of the assistant" if own else ""
        raise RowError(
            f"the last message is not from the assistant but from the {turns[-1].role}: there is no reference answer",
            remedy,
        )
    return own[-1:]


# --- writing ------------------------------------------------------------------------------------------------------


def _build(conversation: Conversation, layout: str, metadata_json: str, more_notes: list[str]) -> Example:
    reference = conversation.reference
    calls, response = list(reference.calls), reference.text if reference.text.strip() else None
    think = reference.thought
    if reference.written:
        ground_truth = reference.written
    else:
        ground_truth = answers.compose_answer(calls, think=think, response=response)
        think = think or answers.PLACEHOLDER_THOUGHT
    tools, system = conversation.tools, conversation.system
    tools_json = _json_text(tools)  # before they are written anywhere: what JSON cannot hold is refused
    messages = [_tagged_message(turn) for turn in conversation.turns]
    if tools and TOOL_LIST not in system:
        messages.insert(
            0, {"role": "system", "content": prompt_style.write_tools(system or prompt_style.ROLE_SENTENCE, tools)}
        )
    elif system:
        messages.insert(0, {"role": "system", "content": system})
    return Example(
        messages=messages,
        ground_truth=ground_truth,
        calls=calls,
        tools=tools,
        think=think,
        response=response,
        calls_json=_json_text(calls),
        tools_json=tools_json,
        prompt_id=_content_hash(messages, ground_truth),
        system=system,
        turns=conversation.turns,
        layout=layout,
        notes=(*conversation.notes, *more_notes),
        problems=conversation.problems,
        metadata_json=metadata_json,
    )


def _tagged_message(turn: Turn) -> Message:
    """A turn of the prompt as text in ToolRL's tags."""
    text = turn.written or turn.text
    if turn.calls and not turn.written:
        text = answers.compose_answer(list(turn.calls), think=turn.thought, response=turn.text.strip() or None)
    return {"role": turn.role, "content": text}


def _json_text(value: Any) -> str:
    text = dumps(value)
    text.encode()
    return text


def _content_hash(messages: list[Message], ground_truth: str) -> str:
    parts = [part.encode() for m in messages for part in (m["role"], m["content"])]
    sized = (len(data).to_bytes(8, "little") + data for data in (*parts, ground_truth.encode()))
    return hashlib.sha256(b"".join(sized)).hexdigest()[:32]
