"""Rows that say the same otherwise, and rows that are damaged: what may come of each is known beforehand.

    python -m tests.data_tools.mutations --rows 20000 --files 200 --seed 1

A case is right if its calls are those that the row still makes, or if it is refused, or counted as a problem.  Wrong is
everything else: above all an answer in text that hides a call, from which a policy would learn not to call.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.convert import ConvertOptions, convert_rows
from data_tools.encode import EncodeOptions, check_reference
from data_tools.errors import DataError, RowError
from data_tools.examples import examples_of
from megatron_rest.regions import (
    DEEPSEEK,
    DEEPSEEK_V31,
    GLM45,
    HARMONY,
    MISTRAL,
    MISTRAL_V11,
    PYTHONIC,
    QWEN3_CODER,
    ToolCallError,
)
from megatron_rest.regions.dialect import Dialect

Call = dict[str, Any]
Row = dict[str, Any]


def _tool(name: str, required: list[str], **properties: Any) -> Row:
    fields = {key: kind if isinstance(kind, dict) else {"type": kind} for key, kind in properties.items()}
    return {
        "name": name,
        "description": f"To {name.replace('_', ' ')}.",
        "parameters": {"type": "object", "properties": fields, "required": required},
    }


TOOLS = [
    _tool("tide_table", ["harbour"], harbour="string", day="string", hours="integer"),
    _tool("book_ferry", ["port"], port="string", seats="integer", bicycles="boolean"),
    _tool("convert_units", ["value", "unit"], value="number", unit="string"),
    _tool("send_note", ["text"], text="string", tags={"type": "array", "items": {"type": "string"}}),
]
FUNCTIONS = [{"type": "function", "function": tool} for tool in TOOLS]
PLAIN = ("Sète", "Bern", "at noon", "日本 🙂", "100%", "3", "true", "a-b_c.d", "https://x.example/?a=1&b=2")
ODD = (
    *("it's half past", 'say "hi"', "a, b=c", "[x](y)", "{braces}", "two\nlines", "<b>bold</b>", "C:\\dir", ""),
    *("  wide ", "f(x='y')", "null", "a; b", "x\u2028y", "</b>", "None", "[1, 2]", '{"a": 1}'),
)
VALUES: dict[str, tuple[Any, ...]] = {
    "integer": (0, 3, 12),
    "number": (1.5, 40, -2),
    "boolean": (True, False),
    "array": ([], ["sea", "boat"]),
}
QUESTION = "When is high water, and can I take the ferry?"
USER = {"role": "user", "content": QUESTION}


def random_calls(chance: random.Random, *, odd: bool = True, most: int = 3) -> list[Call]:
    """One to three calls of the tools, as ``{"name", "parameters"}``."""
    calls = []
    for _ in range(chance.randint(1, most)):
        tool = chance.choice(TOOLS)
        fields = tool["parameters"]["properties"]
        keys = [key for key in fields if key in tool["parameters"]["required"] or chance.random() < 0.6]
        texts = (*PLAIN, *ODD) if odd else PLAIN
        held = {key: chance.choice(VALUES.get(fields[key]["type"], texts)) for key in keys}
        calls.append({"name": tool["name"], "parameters": held})
    return calls


# --- spellings: calls as text ------------------------------------------------------------------------------------

Writer = Callable[[list[Call]], str]


def _objects(calls: list[Call], key: str = "arguments") -> list[Row]:
    return [{"name": call["name"], key: call["parameters"]} for call in calls]


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _each(form: str, key: str = "arguments", between: str = "\n", write: Callable[..., str] = _json) -> Writer:
    return lambda calls: between.join(form % write(item) for item in _objects(calls, key))


def _all(form: str) -> Writer:
    return lambda calls: form % _json(_objects(calls))


def _of(dialect: Dialect) -> Writer:
    return lambda calls: dialect.calls.write([(call["name"], call["parameters"]) for call in calls])


def _pythonic(calls: list[Call]) -> str:
    return _of(PYTHONIC)(calls)


def _invoke(calls: list[Call]) -> str:
    def one(call: Call) -> str:
        held = "".join(
            f'<parameter name="{key}">{value if isinstance(value, str) else _json(value)}</parameter>\n'
            for key, value in call["parameters"].items()
        )
        return f'<invoke name="{call["name"]}">\n{held}</invoke>\n'

    return "<function_calls>\n" + "".join(map(one, calls)) + "</function_calls>"


def _kimi(calls: list[Call]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{call['name']}:{n}<|tool_call_argument_begin|>{_json(call['parameters'])}"
        "<|tool_call_end|>"
        for n, call in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def _named(form: str, between: str = "\n") -> Writer:
    return lambda calls: between.join(form % (call["name"], _json(call["parameters"])) for call in calls)


SPELLINGS: dict[str, Writer] = {
    "hermes": _each("<tool_call>\n%s\n</tool_call>"),
    "hermes, a list": _all("<tool_call>%s</tool_call>"),
    "hermes, Python": _each("<tool_call>%s</tool_call>", write=repr),
    "hermes, pretty": _each("<tool_call>\n%s\n</tool_call>", write=lambda item: _json(item, indent=2)),
    "lines in a block": lambda calls: f"<tool_call>\n{_each('%s', 'parameters')(calls)}\n</tool_call>",
    "toolcall": _all("<TOOLCALL>%s</TOOLCALL>"),
    "function_call": _each("<function_call>%s</function_call>"),
    "glaive": _each("<functioncall> %s"),
    "llama3": _each("%s", "parameters", "; "),
    "python tag": _all("<|python_tag|>%s"),
    "pythonic": _pythonic,
    "fenced": _all("```json\n%s\n```"),
    "granite": _all("<|tool_call|>%s"),
    "phi": _all("<|tool_call|>%s<|/tool_call|>"),
    "internlm": lambda calls: f"<|action_start|><|plugin|>{_json(_objects(calls))}<|action_end|>",
    "lfm2": lambda calls: f"<|tool_call_start|>{_pythonic(calls)}<|tool_call_end|>",
    "api_bank": lambda calls: f"API-Request: {_pythonic(calls)}",
    "mistral": _of(MISTRAL),
    "mistral_v11": _of(MISTRAL_V11),
    "qwen3_coder": _of(QWEN3_CODER),
    "seed_oss": lambda calls: _of(QWEN3_CODER)(calls).replace("tool_call>", "seed:tool_call>"),
    "glm45": _of(GLM45),
    "deepseek": _of(DEEPSEEK),
    "deepseek_v31": _of(DEEPSEEK_V31),
    "harmony": lambda calls: _of(HARMONY)(calls[:1]),
    "react": lambda calls: _named("Thought: Look it up.\nAction: %s\nAction Input: %s")(calls[:1]),
    "kimi_k2": _kimi,
    "invoke": _invoke,
    "minimax": lambda calls: _invoke(calls).replace("function_calls>", "minimax:tool_call>"),
    "llama3.1": _named("<function=%s>%s</function>"),
    "qwen_agent": _named("✿FUNCTION✿: %s\n✿ARGS✿: %s"),
}
ONE_CALL = {"harmony", "react"}
UNTYPED = {"qwen3_coder", "seed_oss", "glm45", "invoke", "minimax"}
TAGS = (
    *("<tool_call>", "</tool_call>", "<TOOLCALL>", "</TOOLCALL>", "<functioncall>", "<|python_tag|>", "[TOOL_CALLS]"),
    *("<function_call>", "</function_call>", "</s>", "<|im_end|>", "<|tool_call|>", "</think>", "```", "</function>"),
)
LEADS = ("", "", "<think>\nLook it up.\n</think>\n\n", "I look it up for you.\n")


# --- cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row, and what may come of it beside a refusal or a problem."""

    kind: str
    row: Row
    right: tuple[list[Call], ...]  # any of these calls
    num_calls: int | None = None  # or so many, whatever they say: damage to a value is a value
    is_typed: bool = True  # False: the spelling writes no types, "3" and 3 are the same
    turn: int | None = None  # of the prompt that makes the calls; None: the reference


def said(text: str, chance: random.Random) -> tuple[Row, int | None]:
    """A row whose assistant says ``text``, and which turn of the prompt that is (None: the reference)."""
    tools: Row = {"tools": FUNCTIONS} if chance.random() < 0.7 else {}
    spoken = {"role": "assistant", "content": text}
    choice = chance.randrange(6)
    if choice == 0:
        return {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": text}], **tools}, None
    if choice == 1:
        return {"prompt": [USER], "completion": [spoken], **tools}, None
    if choice == 2:
        return {"instruction": QUESTION, "input": "", "output": text, "system": "", "history": [], **tools}, None
    if choice == 3:
        more = [{"role": "user", "content": "Thank you. Is it far?"}, {"role": "assistant", "content": "Not far."}]
        return {"messages": [USER, spoken, *more], **tools}, 1
    return {"messages": [USER, spoken], **tools}, None


def text_case(chance: random.Random) -> Case:
    """A spelling of calls, mutated."""
    name = chance.choice([*SPELLINGS])
    kind = chance.choice([*TEXT_MUTATIONS])
    calls = random_calls(chance, odd=kind not in NEEDS_PLAIN_VALUES, most=1 if name in ONE_CALL else 3)
    lead = chance.choice(LEADS)
    try:
        text, right, num_calls = TEXT_MUTATIONS[kind](SPELLINGS[name], calls, lead, chance)
    except ToolCallError:  # that the spelling cannot write: a name with a space in Python
        return text_case(chance)
    if name in UNTYPED and kind in ("not a number", "nested deeply", "trailing comma"):
        num_calls = len(calls)  # what is no JSON is text there
    row, turn = said(text, chance)
    return Case(
        kind=f"{kind} ({name})", row=row, right=right, num_calls=num_calls, turn=turn, is_typed=name not in UNTYPED
    )


Mutated = tuple[str, tuple[list[Call], ...], int | None]
Mutation = Callable[[Writer, list[Call], str, random.Random], Mutated]


def _bare(text: str) -> str:
    return re.sub(r"[\s;,]+", "", text)


def _parts_of(write: Writer, calls: list[Call], lead: str, text: str) -> tuple[list[Call], ...]:
    """Calls that a damaged text still makes whole: of none to all, from the front or from the back."""
    parts = [calls[:n] for n in range(len(calls) + 1)] + [calls[n:] for n in range(len(calls))]
    whole = {_bare(lead + (write(part) if part else "")): part for part in parts}
    return (whole[_bare(text)],) if _bare(text) in whole else ()


def cut_short(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    whole = lead + write(calls)
    text = whole[: chance.randrange(len(whole))]
    if len(text) < len(lead):  # only words of a lead are left, or a thought that is never closed
        return text, () if lead.startswith("<think>") else ([],), None
    left = text[len(lead) :].strip()
    if (left.replace("-", "").isalnum() and len(left) < 4) or (left and "Thought:".startswith(left)):
        return text, ([],), None  # a few letters of a label: nobody can tell
    return text, _parts_of(write, calls, lead, text), None


def cut_in_front(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    whole = write(calls)
    text = whole[chance.randrange(1, min(40, len(whole))) :]
    return lead + text, (*_parts_of(write, calls, lead, lead + text), calls), len(calls)


def edited(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    text = write(calls)
    at, size = chance.randrange(len(text)), chance.choice((1, 1, 2, 5))
    text = text[:at] + chance.choice(("", "<", '"', "}", " ", "x", "\\", "'", ",", "\n")) + text[at + size :]
    return lead + text, (calls,), len(calls)


def tag_dropped(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    text = write(calls)
    tags = [*re.finditer(r"</?[\w|:=▁｜ ]+\|?>|\[/?[A-Z_]+\]|```\w*|[\[\]{}()]", text)]
    if not tags:
        return lead + text, (calls,), None
    tag = chance.choice(tags)
    other = chance.choice(TAGS) if chance.random() < 0.5 else ""
    return lead + text[: tag.start()] + other + text[tag.end() :], (calls,), len(calls)


def foreign_tags(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    return lead + chance.choice(TAGS) + write(calls) + chance.choice(("", *TAGS)), (calls,), None


def single_quotes(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    return lead + write(calls).replace('"', "'"), (calls,), None


def trailing_comma(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    return lead + re.sub(r"([}\])])", r",\1", write(calls), count=chance.choice((1, 2, 0))), (calls,), None


def escaped(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    text = "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in write(calls))
    return lead + text, (calls,), len(calls)  # in elements an escape is text


def html_escaped(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    return lead + html.escape(write(calls)), (calls,), None


def twice_escaped(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    return lead + json.dumps(write(calls))[1:-1], (calls,), len(calls)


def not_a_number(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    poor = [
        {**call, "parameters": {**call["parameters"], "hours": float(chance.choice(("nan", "inf")))}} for call in calls
    ]
    return lead + write(poor), (), None


def nested_deeply(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    deep: Any = "x"
    for _ in range(chance.choice((40, 300))):
        deep = [deep]
    calls = [{**call, "parameters": {**call["parameters"], "tags": deep}} for call in calls]
    return lead + write(calls), (calls,), None


def no_name(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    text = write(calls)
    for call in calls:
        text = re.sub(rf"\"name\": \"{call['name']}\",? ?|{call['name']}", "", text)
    return lead + text, (), None


def other_name(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    calls = [{**call, "name": call["name"] + chance.choice(("x", "_v2", " ", ".run"))} for call in calls]
    return lead + write(calls), (calls,), len(calls)


def other_keys(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    name = chance.choice(("Name", "tool", "function", "func", "tool_name"))
    arguments = chance.choice(("Arguments", "args", "kwargs", "params", "tool_input", "argument"))
    text = re.sub(r"\"(?:arguments|parameters)\":", f'"{arguments}":', write(calls).replace('"name":', f'"{name}":'))
    return lead + text, (calls,), None


def twice(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    return lead + write(calls) + "\n" + write(calls), ([*calls, *calls],), None


def talked_around(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    behind = chance.choice(("\nOne moment, please.", " Done.", "\n\n"))
    return lead + "Of course. " + write(calls) + behind, (calls,), None


def spaced(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    text = write(calls)
    text = text.replace("\n", "\r\n") if chance.random() < 0.5 else f"\n\n {text} \n\t"
    return lead + text, (calls,), None


def in_a_fence(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    return lead + f"```{chance.choice(('', 'json', 'python', 'xml'))}\n{write(calls)}\n```", (calls,), None


def in_capitals(write: Writer, calls: list[Call], lead: str, chance: random.Random) -> Mutated:
    change = str.upper if chance.random() < 0.5 else str.swapcase
    text = re.sub(r"</?[\w|:]+>|\[/?[A-Z_]+\]|\"(?:name|arguments|parameters)\"", lambda m: change(m[0]), write(calls))
    return lead + text, (calls,), len(calls)  # values may look like tags


TEXT_MUTATIONS: dict[str, Mutation] = {
    mutate.__name__.replace("_", " "): mutate
    for mutate in (
        *(cut_short, cut_short, cut_in_front, edited, tag_dropped, foreign_tags, single_quotes, trailing_comma),
        *(escaped, html_escaped, twice_escaped, not_a_number, nested_deeply, no_name, other_name, other_keys, twice),
        *(talked_around, spaced, in_a_fence, in_capitals),
    )
}
NEEDS_PLAIN_VALUES = {"single quotes", "trailing comma", "twice escaped", "html escaped", "spaced", "other keys"}


# --- values ------------------------------------------------------------------------------------------------------


def value_case(chance: random.Random) -> Case:
    """Calls as values, mutated one by one, in one of the containers that sets have."""
    calls = random_calls(chance)
    kind = chance.choice([*CALL_MUTATIONS])
    spoilt = chance.randrange(len(calls))
    objects: list[Any] = _objects(calls)
    objects[spoilt], is_harmless = CALL_MUTATIONS[kind](objects[spoilt], chance)
    container = chance.choice([*CONTAINERS])
    row = CONTAINERS[container](objects)
    right: tuple[list[Call], ...] = (calls,) if is_harmless else ()
    more = chance.choice([*ROW_MUTATIONS])
    row, right = ROW_MUTATIONS[more](row, right, chance)
    return Case(kind=f"{kind}, {more} ({container})", row=row, right=right)


def _openai(calls: list[Any]) -> Row:
    wrapped = [{"id": f"c{n}", "type": "function", "function": call} for n, call in enumerate(calls)]
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": wrapped}], "tools": FUNCTIONS}


def _plain(calls: list[Any]) -> Row:
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": TOOLS}


CONTAINERS: dict[str, Callable[[list[Any]], Row]] = {
    "openai": _openai,
    "plain calls": _plain,
    "calls as text": lambda calls: _plain(json.dumps(calls)),  # type: ignore[arg-type]
    "messages as text": lambda calls: {**(row := _openai(calls)), "messages": json.dumps(row["messages"])},
    "sharegpt": lambda calls: {
        "conversations": [
            {"from": "human", "value": QUESTION},
            {"from": "function_call", "value": json.dumps(calls)},
        ],
        "tools": json.dumps(TOOLS),
    },
    "xlam": lambda calls: {"query": QUESTION, "answers": json.dumps(calls), "tools": json.dumps(TOOLS)},
    "xlam, values": lambda calls: {"query": QUESTION, "answers": calls, "tools": TOOLS},
    "verl": lambda calls: {"prompt": [USER], "reward_model": {"ground_truth": calls}, "tools": TOOLS},
    "trl": lambda calls: {"prompt": [USER], "completion": _plain(calls)["messages"][1:], "tools": FUNCTIONS},
    "api_bank": lambda calls: {"system": "", "user": QUESTION, "answer": calls, "tools": TOOLS},
    "parts": lambda calls: {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", **call} if isinstance(call, dict) else {"type": "tool_use", "text": call}
                    for call in calls
                ],
            },
        ],
        "tools": TOOLS,
    },
    "gemini": lambda calls: {
        "contents": [
            {"role": "user", "parts": [{"text": QUESTION}]},
            {"role": "model", "parts": [{"functionCall": call} for call in calls]},
        ],
        "tools": [{"functionDeclarations": TOOLS}],
    },
}
CallMutation = Callable[[Row, random.Random], tuple[Any, bool]]


def _with(call: Row, value: Any) -> Row:
    return {**call, "arguments": value}


def _deep(call: Row) -> Any:
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    return deep


CALL_MUTATIONS: dict[str, CallMutation] = {
    "as it is": lambda call, chance: (call, True),
    "arguments as text": lambda call, chance: (_with(call, json.dumps(call["arguments"])), True),
    "arguments as text of text": lambda call, chance: (_with(call, json.dumps(json.dumps(call["arguments"]))), True),
    "arguments as pairs": lambda call, chance: (_with(call, [*map(list, call["arguments"].items())]), True),
    "arguments renamed": lambda call, chance: (
        {"name": call["name"], chance.choice(("args", "kwargs", "input", "parameters")): call["arguments"]},
        True,
    ),
    "arguments under an unknown key": lambda call, chance: ({"name": call["name"], "with": call["arguments"]}, False),
    "arguments twice": lambda call, chance: ({**call, "args": {"port": "elsewhere"}}, False),
    "arguments cut": lambda call, chance: (
        _with(call, (text := json.dumps(call["arguments"]))[: chance.randrange(1, len(text))]),
        False,
    ),
    "arguments with a comma": lambda call, chance: (_with(call, json.dumps(call["arguments"])[:-1] + ",}"), True),
    "arguments are no object": lambda call, chance: (
        _with(call, chance.choice([[1], 3, True, "x", "null", "[]", [["a"]], "3"])),
        False,
    ),
    "not a number": lambda call, chance: (
        _with(call, {**call["arguments"], "hours": float(chance.choice(("nan", "inf")))}),
        False,
    ),
    "not a number in text": lambda call, chance: (_with(call, '{"hours": NaN}'), False),
    "a key twice": lambda call, chance: (_with(call, '{"port": "Bern", "port": "Thun"}'), False),
    "no name": lambda call, chance: ({"arguments": call["arguments"]}, False),
    "a bad name": lambda call, chance: ({**call, "name": chance.choice((None, "", 3, [], {}, "tide table"))}, False),
    "padded": lambda call, chance: (
        {**call, "result": None, "error": None, "arguments": {**call["arguments"], "gap": None}},
        True,
    ),
    "nested deeply": lambda call, chance: (_with(call, {**call["arguments"], "tags": _deep(call)}), False),
    "only a name": lambda call, chance: (call["name"], False),
    "text": lambda call, chance: (json.dumps(call), True),
    "half a surrogate": lambda call, chance: (_with(call, {**call["arguments"], "port": "\ud800"}), False),
}
Right = tuple[list[Call], ...]
RowMutation = Callable[[Row, Right, random.Random], tuple[Row, Right]]


def _messages(row: Row) -> tuple[str, list[Row]] | None:
    key = next((key for key in ("messages", "conversations", "contents", "completion") if key in row), None)
    return (key, row[key]) if key and isinstance(row[key], list) else None


def roles_swapped(row: Row, right: Right, chance: random.Random) -> tuple[Row, Right]:
    found = _messages(row)
    if found is None or len(found[1]) < 2:
        return row, right
    key, (first, last) = found
    role = "from" if "from" in first else "role"
    return {**row, key: [{**first, role: last[role]}, {**last, role: first[role]}]}, ()


def role_renamed(row: Row, right: Right, chance: random.Random) -> tuple[Row, Right]:
    found = _messages(row)
    if found is None or found[0] in ("conversations", "contents"):
        return row, right
    key, (*rest, last) = found
    return {**row, key: [*rest, {**last, "role": chance.choice(("gpt", "model", "Assistant", "bot"))}]}, right


def key_renamed(row: Row, right: Right, chance: random.Random) -> tuple[Row, Right]:
    """Calls under a key that is not known, beside a text."""
    found = _messages(row)
    if found is None or not found[1][-1].get("tool_calls"):
        return row, right
    key, (*rest, last) = found
    calls = last["tool_calls"]
    if isinstance(calls, list) and any(isinstance(call, str) for call in calls):
        return row, right  # names of tools are no calls
    name = chance.choice(("toolCalls", "tool_call", "calls_made", "functions_called", "_calls"))
    return {**row, key: [*rest, {"role": "assistant", "content": "I look it up.", name: calls}]}, right


def spoken_too(row: Row, right: Right, chance: random.Random) -> tuple[Row, Right]:
    found = _messages(row)
    if found is None or "tool_calls" not in found[1][-1]:
        return row, right
    key, (*rest, last) = found
    return {**row, key: [*rest, {**last, "content": "I look it up."}]}, right


def answered_in_text(row: Row, right: Right, chance: random.Random) -> tuple[Row, Right]:
    """The calls are in a column of their own, and the messages end in text."""
    if "answers" not in row or not right:
        return row, right
    return {"messages": [USER, {"role": "assistant", "content": "At noon."}], "expected": row["answers"]}, right


def padded(row: Row, right: Right, chance: random.Random) -> tuple[Row, Right]:
    found = _messages(row)
    if found is None:
        return {**row, "other": None}, right
    key, messages = found
    gaps = {"name": None, "tool_call_id": None, "reasoning_content": None, "function_call": None}
    return {**row, key: [{**gaps, **message} for message in messages]}, right


def without_tools(row: Row, right: Right, chance: random.Random) -> tuple[Row, Right]:
    return {key: value for key, value in row.items() if key != "tools"}, right


def other_columns(row: Row, right: Right, chance: random.Random) -> tuple[Row, Right]:
    return {"id": 7, "source": "own", "score": float("nan"), **row, "meta": {"a": [1, None]}, "split": None}, right


ROW_MUTATIONS: dict[str, RowMutation] = {
    "whole": lambda row, right, chance: (row, right),
    **{
        mutate.__name__.replace("_", " "): mutate
        for mutate in (
            *(roles_swapped, role_renamed, key_renamed, spoken_too, answered_in_text, padded, without_tools),
            other_columns,
        )
    },
}


# --- judging -----------------------------------------------------------------------------------------------------


def same(calls: list[Call], other: list[Call], *, is_typed: bool = True) -> bool:
    """Equal as JSON, where True is not 1."""
    if not is_typed:
        calls, other = _untyped(calls), _untyped(other)
    return json.dumps(calls, sort_keys=True) == json.dumps(other, sort_keys=True)


def _untyped(calls: list[Call]) -> list[Call]:
    def text(value: Any) -> str:
        written = value if isinstance(value, str) else _json(value)
        return {"True": "true", "False": "false", "None": "null"}.get(written, re.sub(r"\s", "", written))

    held = [{key: text(value) for key, value in call["parameters"].items()} for call in calls]
    kept = [{key: value for key, value in values.items() if value != "null"} for values in held]
    return [{**call, "parameters": values} for call, values in zip(calls, kept, strict=True)]


def judge(case: Case, calls: list[Call]) -> str:
    """``right``, or what is wrong with the calls that came out."""
    if any(same(calls, right, is_typed=case.is_typed) for right in case.right):
        return "right"
    if case.num_calls is not None and len(calls) == case.num_calls:
        return "right"
    return f"{case.kind}: {_shown(case.row)} gave {_shown(calls)}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:700]


def outcome(case: Case) -> str:
    """``right``, ``refused``, ``problem``, or what is wrong."""
    try:
        [example] = examples_of(case.row)
        check_reference(example)
    except RowError as error:
        return f"{case.kind}: {error}" if "unexpected shape" in str(error) else "refused"
    found = judge(case, example.calls if case.turn is None else list(example.turns[case.turn].calls))
    return "problem" if found != "right" and example.problems else found


def cases(count: int, seed: int) -> Iterator[Case]:
    """Two of three are texts."""
    chance = random.Random(seed)
    for _ in range(count):
        yield text_case(chance) if chance.random() < 2 / 3 else value_case(chance)


def run(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(outcomes, everything that is wrong)."""
    outcomes: Counter[str] = Counter()
    wrong = []
    for case in cases(count, seed):
        found = outcome(case)
        outcomes[found if found in ("right", "refused", "problem") else "wrong"] += 1
        if found not in ("right", "refused", "problem"):
            wrong.append(found)
    return outcomes, wrong


# --- files -------------------------------------------------------------------------------------------------------


def _texts(rows: list[Row]) -> pa.Table:
    """Columns of text: JSON where a value is none."""
    names = dict.fromkeys(key for row in rows for key in row)
    return pa.table(
        {
            name: [value if isinstance(value := row.get(name), str | None) else json.dumps(value) for row in rows]
            for name in names
        }
    )


def _ipc(path: Path, rows: list[Row]) -> None:
    table = _texts(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def _lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FORMS: dict[str, Callable[[Path, list[Row]], Any]] = {
    "rows.jsonl": lambda path, rows: path.write_bytes(_lines(rows)),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "objects.json": lambda path, rows: path.write_text("\n".join(json.dumps(row, indent=1) for row in rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(_lines(rows))),
    "texts.parquet": lambda path, rows: pq.write_table(_texts(rows), path),
    "structs.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "texts.arrow": _ipc,
}


def run_files(count: int, seed: int, folder: Path, tokenizer: Path) -> tuple[Counter[str], list[str]]:
    """Files of mutated rows, some cut short, through a whole conversion that refuses what is suspicious."""
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        made = [case for case in cases(12, seed * 100_000 + number) if case.turn is None]
        form = chance.choice([*FORMS])
        if form == "structs.parquet":  # which takes the columns of the first row
            made = [case for case in made if case.row.keys() == made[0].row.keys()]
        path = folder / form
        try:
            FORMS[form](path, [case.row for case in made])
        except (pa.ArrowException, UnicodeError, TypeError, ValueError):  # no table can hold these rows
            path = folder / "rows.jsonl"
            FORMS["rows.jsonl"](path, [case.row for case in made])
        if path.name == "rows.jsonl" and chance.random() < 0.5:
            data = path.read_bytes()
            path.write_bytes(data[: chance.randrange(len(data) // 2, len(data))])
        options = ConvertOptions(
            inputs=[str(path)],
            output=folder / "out",
            tokenizer=tokenizer,
            encode=EncodeOptions(dialect="toolrl", on_problem="quarantine"),
            processes=1,
            progress_bar=False,
            overwrite=True,
        )
        try:
            convert_rows(options)
        except DataError:
            outcomes["files refused"] += 1
            continue
        outcomes["files converted"] += 1
        for shard in sorted((folder / "out").glob("data-*.arrow")):
            for row in pa.ipc.open_file(shard).read_all().to_pylist():
                found = judge(made[row["source_row"]], json.loads(row["calls"]))
                outcomes["rows right" if found == "right" else "rows wrong"] += 1
                wrong += [] if found == "right" else [f"{path.name}: {found}"]
    return outcomes, wrong


def main() -> int:
    """Rows, then files; exit status 1 if anything is wrong."""
    from data_tools.train_tokenizer import texts_of, train_and_save
    from tests.data_tools.conftest import SAMPLES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    outcomes, wrong = run(arguments.rows, arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        tokenizer = Path(name) / "tokenizer"
        train_and_save(texts_of([str(SAMPLES / "test.parquet")]), vocab_size=600, output=tokenizer)
        of_files, more = run_files(arguments.files, arguments.seed, Path(name), tokenizer)
    print(json.dumps({"rows": outcomes, "files": of_files, "wrong": len(wrong) + len(more)}))
    print("\n".join([*wrong, *more]), file=sys.stderr)
    return 1 if wrong or more else 0


if __name__ == "__main__":
    sys.exit(main())
