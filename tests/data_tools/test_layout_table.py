"""Every layout by its content, every spelling of calls; what cannot be right is refused and says how to mend it."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_tools.columns import Columns
from data_tools.encode import check_reference
from data_tools.errors import DataError, RowError
from data_tools.examples import NO_CALL_RESPONSE, Example, Reading, examples_of, normalise
from data_tools.layouts import LAYOUTS, table
from data_tools.native import native_messages
from tests.data_tools import public_layouts
from tests.data_tools.layout_rows import (
    CALLS,
    FUNCTIONS,
    HERMES,
    LAYOUT_ROWS,
    OPENAI,
    QUESTION,
    READ,
    REFUSED_ROWS,
    SPELLINGS,
    TOOLS,
    UNREADABLE,
    USER,
)

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": text, **more}], "tools": FUNCTIONS}


def by(row: dict[str, Any], **columns: Any) -> Example:
    return normalise(row, Reading(columns=Columns.from_pairs(columns)))


@pytest.mark.parametrize("name", LAYOUT_ROWS)
def test_every_layout_is_recognised_and_means_the_same(name: str) -> None:
    example = normalise(LAYOUT_ROWS[name])
    check_reference(example)
    assert example.layout == name
    assert example.calls == (READ[1:] if name == "toolbench" else READ)
    assert example.tools == TOOLS
    assert [message["content"] for message in example.messages if message["role"] == "user"] == [QUESTION]
    assert (example.response, example.problems) == (None, ())
    assert normalise(LAYOUT_ROWS[name], Reading(layout=name)) == example
    quarantined = {"file": "f", "row": 3, "reason": "r", "content": LAYOUT_ROWS[name]}
    assert normalise(quarantined) == example, "a mended line of a quarantine goes in again"


@pytest.mark.parametrize("name", REFUSED_ROWS)
def test_what_is_no_training_data_is_named(name: str) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    with pytest.raises(RowError) as caught:
        normalise(REFUSED_ROWS[name])
    assert str(caught.value) == layout.refusal


@pytest.mark.parametrize("layout", public_layouts.LAYOUTS, ids=lambda layout: layout.name)
def test_the_layouts_of_public_sets_need_no_option(layout: public_layouts.PublicLayout, tmp_path: Path) -> None:
    assert public_layouts.why_wrong(layout, tmp_path) == ""


def test_what_is_wrong_with_a_layout_is_found(tmp_path: Path) -> None:
    right = next(layout for layout in public_layouts.LAYOUTS if layout.name == "xLAM-60k")
    for change in ({"calls": ()}, {"tools": ()}, {"think": "Why?"}, {"refusal": "images"}):
        assert public_layouts.why_wrong(dataclasses.replace(right, **change), tmp_path)


def test_the_table_is_whole_and_the_page_shows_it() -> None:
    assert {layout.name for layout in LAYOUTS} == {*LAYOUT_ROWS, *REFUSED_ROWS, "quarantine"}
    assert table() in PAGE, "python -m data_tools.layouts prints the table for docs/data.md"
    assert public_layouts.table() in PAGE, "python -m tests.data_tools.public_layouts prints the other"
    read = [layout for layout in public_layouts.LAYOUTS if not layout.refusal]
    assert f"{len(read)} of {len(public_layouts.LAYOUTS)}" in PAGE


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("lead", ["", "<think>\nLook.\n</think>\n\n"])
def test_calls_in_text_are_calls(name: str, lead: str) -> None:
    example = normalise(said(lead + SPELLINGS[name]))
    assert (example.calls, example.response) == (READ, None)
    assert example.think == "Look." or not lead
    history = [
        *said(SPELLINGS[name])["messages"],
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": "ok"},
    ]
    example = normalise({"messages": history, "tools": FUNCTIONS})
    assert [call["function"]["name"] for call in native_messages(example)[1]["tool_calls"]] == ["weather", "price"]


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_looks_like_a_call_is_never_kept_as_text(name: str) -> None:
    with pytest.raises(RowError, match=r"looks like a call|never closes it"):
        normalise(said(UNREADABLE[name]))


@pytest.mark.parametrize(
    "text",
    [
        "See [Bern](http://x) and {this} <b>bold</b> (note).",
        '{"town": "Bern", "rain": false}',
        "Use:\n```python\nprint(x=1)\n```",
    ],
)
def test_text_stays_text(text: str) -> None:
    assert normalise(said(text)).response == text


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "kwargs", "input"])
def test_arguments_under_every_key(key: str) -> None:
    for value in (CALLS[0]["arguments"], json.dumps(CALLS[0]["arguments"]), list(CALLS[0]["arguments"].items())):
        row = said("", tool_calls=[{"name": "weather", key: value}])
        assert normalise(row).calls == READ[:1]
    with pytest.raises(RowError, match="no arguments under"):
        normalise(said("", tool_calls=[{"name": "weather", "with": {"town": "Bern"}}]))


def test_nulls_are_kept_where_the_tool_wants_them() -> None:
    schema = {"type": "object", "properties": {"at": {"type": "string"}, "label": {"type": ["string", "null"]}}}
    call = {"name": "alarm", "arguments": {"at": "6", "label": None, "town": None, "deep": {"x": None}}}
    row = {
        "messages": [USER, {"role": "assistant", "tool_calls": [call]}],
        "tools": [{"name": "alarm", "parameters": schema}],
    }
    assert normalise(row).calls[0]["parameters"] == {"at": "6", "label": None, "deep": {}}
    assert by(row, nulls="drop").calls[0]["parameters"] == {"at": "6", "deep": {}}
    assert by(row, nulls="keep").calls[0]["parameters"] == call["arguments"]


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "weather", "inputSchema": TOOLS[0]["parameters"]}],
        [{"name": "weather", "input_schema": json.dumps(TOOLS[0]["parameters"])}],
        {"weather": {"parameters": TOOLS[0]["parameters"]}},
        {"name": "weather", "parameters": TOOLS[0]["parameters"]},
        [
            {
                "name": "weather",
                "parameters": {
                    **TOOLS[0]["parameters"],
                    "properties": json.dumps(TOOLS[0]["parameters"]["properties"]),
                },
            }
        ],
        [
            {
                "name": "weather",
                "parameters": {"type": "object", "properties": TOOLS[0]["parameters"]["properties"]},
                "required": ["town"],
            }
        ],
        [
            json.dumps(
                {
                    "type": "function",
                    "function": {"name": "weather", "parameters": {**TOOLS[0]["parameters"], "item": None}},
                }
            )
        ],
    ],
    ids=["MCP", "Anthropic", "by name", "one", "properties as text", "required beside", "padded texts"],
)
def test_tool_lists_keep_their_schema(tools: Any) -> None:
    example = normalise({"messages": [USER, {"role": "assistant", "tool_calls": CALLS[:1]}], "tools": tools})
    assert example.tools == [{"name": "weather", "description": "", "parameters": TOOLS[0]["parameters"]}]
    assert example.problems == ()


def test_a_prompt_has_one_list_and_one_format() -> None:
    system = f"You help. <tools>{json.dumps(FUNCTIONS)}</tools> Give calls in <tool_call>{{}}</tool_call>."
    row = {"messages": [{"role": "system", "content": system}, USER, OPENAI]}
    for made in (row, {**row, "tools": FUNCTIONS}):
        example = normalise(made)
        assert example.tools == TOOLS and example.system == "You help."
        assert example.messages[0]["content"].count("Name: weather") == 1
        assert "<tools>" not in example.messages[0]["content"]
        assert "listed tools" in example.notes[0]


def test_results_follow_their_calls() -> None:
    results = [{"role": "tool", "tool_call_id": f"c{n}", "content": f"of c{n}"} for n in (1, 0)]
    row = {"messages": [USER, OPENAI, *results, {"role": "assistant", "content": "So."}], "tools": FUNCTIONS}
    prompt = native_messages(normalise(row))
    assert [(m["name"], m["content"]) for m in prompt if m["role"] == "tool"] == [
        ("weather", "of c0"),
        ("price", "of c1"),
    ]
    results[0]["tool_call_id"] = "c7"
    with pytest.raises(RowError, match="ids c7, c0 are not those of the calls, c0, c1"):
        normalise(row)


def test_references_of_a_trajectory() -> None:
    row = {"messages": [USER, OPENAI, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "So."}]}
    [last] = examples_of(row)
    assert last.calls == [] and "--reference each" in last.notes[0]
    first, second = examples_of(row, Reading(reference="each"))
    assert (first.calls, second) == (READ, last)
    [calling] = examples_of(row, Reading(reference="last-call"))
    assert calling == first
    [chosen] = examples_of({**row, "best": OPENAI, "messages": [USER]}, Reading(reference="best"))
    assert chosen.calls == READ
    unfinished = {"messages": row["messages"][:3]}
    with pytest.raises(RowError, match=r"not from the assistant but from the tool.*--reference each"):
        normalise(unfinished)


def test_text_beside_calls_and_empty_calls() -> None:
    row = said("Let me look.", tool_calls=CALLS)
    assert normalise(row).response is None and "left out" in normalise(row).notes[0]
    assert by(row, text_with_calls="keep").response == "Let me look."
    assert normalise(said("Let me look.\n" + HERMES)) == normalise(row)
    none = {**LAYOUT_ROWS["xlam"], "answers": "[]"}
    assert normalise(none).response == NO_CALL_RESPONSE and normalise(none).notes
    with pytest.raises(RowError, match=r"neither tool calls.*empty_calls: no-call"):
        by(none, empty_calls="refuse")


def test_problems_are_found() -> None:
    def problems(name: str, arguments: dict[str, Any]) -> str:
        return "".join(normalise(said("", tool_calls=[{"name": name, "arguments": arguments}])).problems)

    assert problems("weather", {"town": "Bern", "days": 2}) == ""
    assert "not among the row's tools: wether" in problems("wether", {})
    assert "required argument is missing: weather(town=...)" in problems("weather", {})
    assert "not among the tool's parameters: weather(city=...)" in problems("weather", {"town": "B", "city": "B"})
    assert "not of its parameter's type: weather(days='2')" in problems("weather", {"town": "B", "days": "2"})
    assert "lists no tools" in "".join(normalise({"messages": [USER, OPENAI]}).problems)


def test_a_mapping_says_what_is_not_recognised() -> None:
    row = {
        "talk": json.dumps([{"who": "customer", "what": QUESTION}, {"who": "run", "what": json.dumps(CALLS)}]),
        "meta": json.dumps({"sets": [{"tools": TOOLS}]}),
    }
    columns = {
        "messages": "talk",
        "message": {"role": "who", "content": "what"},
        "roles": {"customer": "user", "run": "call"},
        "tools": ["functions_of", "meta.sets[0].tools"],
    }
    example = by(row, **columns)
    assert (example.calls, example.tools, example.layout) == (READ, TOOLS, "mapping")
    with pytest.raises(RowError, match=r"role 'customer'.*roles: {customer: user}"):
        by(row, **{**columns, "roles": {}})
    assert by({"q": "x", "gold": CALLS, "tools": TOOLS}, user="q", calls="gold").tools == TOOLS, "its standard name"
    optional = [{"q": "x", "gold": CALLS, "meta": {"why": "Look."}}, {"q": "x", "gold": [], "meta": {"say": "Bye."}}]
    where = {"user": "q", "calls": "gold", "think": "meta.why", "response": "meta.say"}
    assert [by(row, **where).response for row in optional] == [None, "Bye."]
    overlay = {"messages": [USER, OPENAI], "extra": {"known": TOOLS}}
    assert by(overlay, tools="extra.known").tools == TOOLS, "what is recognised stays"
    with pytest.raises(RowError, match=r"'meta.wher' is missing; meta has say.*"):
        by(optional[1], user="meta.wher", calls="gold")


def test_an_adapter_is_the_users_own_code(tmp_path: Path) -> None:
    file = tmp_path / "rows.py"
    file.write_text(
        "def convert(row):\n    if row['q'] == 'no': return None\n    if row['q'] == 'bad': return row['nothing']\n"
        "    return [{'query': q, 'answers': row['gold']} for q in row['q'].split('|')]\n"
    )
    reading = Reading(adapter=f"{file}:convert")
    made = examples_of({"q": "a|b", "gold": CALLS}, reading)
    assert [example.turns[-1].text for example in made] == ["a", "b"]
    assert examples_of({"q": "no"}, reading) == []
    with pytest.raises(RowError, match="the adapter raised KeyError"):
        examples_of({"q": "bad"}, reading)
    for name, why in (
        ("rows.py", "not of the form"),
        ("gone.py:f", "does not exist"),
        (f"{file}:g", "has no function"),
    ):
        with pytest.raises(DataError, match=why):
            examples_of({"q": "a"}, Reading(adapter=name))


def test_odd_shapes_are_refused_not_raised() -> None:
    chance, odd = random.Random(3), [None, 0, "", "x", [], {}, [[]], [None], {"a": None}, True, 1e9, "[", '{"a": 1}']
    for _ in range(1500):
        row = copy.deepcopy(LAYOUT_ROWS[chance.choice([*LAYOUT_ROWS])])
        spot: Any = row
        while isinstance(spot, (dict, list)) and spot:
            key = chance.choice([*spot]) if isinstance(spot, dict) else chance.randrange(len(spot))
            if chance.random() < 0.4 or not isinstance(spot[key], (dict, list)):
                spot[key] = chance.choice(odd)
                break
            spot = spot[key]
        try:
            for example in examples_of(row):
                check_reference(example)
                assert example.calls or example.response
        except RowError:
            pass
