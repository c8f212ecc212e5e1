"""Every layout gives the same example; what cannot be used says why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data_tools.answers import PLACEHOLDER_THOUGHT
from data_tools.columns import Columns, load_columns
from data_tools.errors import DataError, RowError
from data_tools.examples import Reading, normalise
from megatron_rest.data import prompt_style

TOOLS = [{"name": "f", "description": "does f", "parameters": {"a": {"type": "int"}}}]
SYSTEM = prompt_style.write_tools(prompt_style.ROLE_SENTENCE, TOOLS)
CALL = {"name": "f", "parameters": {"a": 1}}
ANSWER = f"<think> {PLACEHOLDER_THOUGHT} </think>\n<tool_call>\n" + json.dumps(CALL) + "\n</tool_call>"
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "do f"}]
FUNCTION = {"type": "function", "function": {**TOOLS[0]}}
CHAT = [
    {"role": "user", "content": "do f"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "verl": {"prompt": MESSAGES, "reward_model": {"style": "rule", "ground_truth": ANSWER}, "data_source": "x"},
    "rlla_sft": {"instruction": SYSTEM, "input": "do f", "output": ANSWER},
    "api_bank list": {"system": SYSTEM, "user": "do f", "answer": [CALL], "other": {"id": 0}},
    "api_bank object": {"system": SYSTEM, "user": "do f", "answer": CALL},
    "io": {"input": "do f", "output": ANSWER, "tools": TOOLS},
    "messages": {"messages": CHAT, "tools": [FUNCTION]},
    "messages, tools as text": {"messages": CHAT, "tools": json.dumps([FUNCTION])},
    "messages, parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "do f"}]}, CHAT[1]],
        "tools": [FUNCTION],
    },
    "messages, tagged": {"messages": [*MESSAGES, {"role": "assistant", "content": ANSWER}]},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_example(name: str) -> None:
    example = normalise(LAYOUTS[name])
    assert example.messages == MESSAGES
    assert example.ground_truth == ANSWER
    assert example.calls == [CALL]
    assert example.tools == TOOLS
    assert example.prompt_id == normalise(LAYOUTS["verl"]).prompt_id


# As the three files of API-Bank have them: two spellings of the tool list, an answer with and without a list, a heading
# with a star too many.
HISTORY = (
    "Dialogue Records History**\n<user>Salary of a doctor?</user>\n\n<user> please only make one tool call</user>\n"
)
SALARY = {"occupation": {"type": "str", "description": "The occupation's name."}}
SALARY_CALL = {"name": "GetSalary", "parameters": {"occupation": "Doctor"}}
API_BANK = [
    (
        f"1. Name: GetSalary\nDescription: Look it up.\nParameters: {SALARY}",
        "**",
        [SALARY_CALL],
        {"file": "f", "id": 0},
    ),
    (f"1. Name: GetSalary\nDescription: Look it up.\nParameters: {SALARY}", "***", SALARY_CALL, {"file": "f", "id": 1}),
    (f"1. GetSalary: Look it up.\nParameters: {SALARY}", "**", [SALARY_CALL], {"sample_id": 44, "api_id": 1}),
]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels_of_api_bank(level: int) -> None:
    tools, stars, answer, other = API_BANK[level - 1]
    system = f"{prompt_style.ROLE_SENTENCE}\n\n{prompt_style.TOOLS_HEADING}{tools}\n\n{prompt_style.INSTRUCTIONS}"
    example = normalise({"system": system, "user": stars + HISTORY, "answer": answer, "other": other})
    assert example.tools == [{"name": "GetSalary", "description": "Look it up.", "parameters": SALARY}]
    assert example.calls == [SALARY_CALL]
    assert [message["content"] for message in example.messages] == [system, stars + HISTORY]
    assert example.think == PLACEHOLDER_THOUGHT


def test_own_columns_give_the_same_example() -> None:
    row = {"meta": {"q": "do f"}, "functions": json.dumps(TOOLS), "gold": json.dumps([CALL])}
    columns = Columns.from_pairs({"user": "meta.q", "tools": "functions", "calls": "gold"})
    assert normalise(row, Reading(columns=columns)) == normalise(LAYOUTS["verl"])


def test_columns_from_a_file_and_options(tmp_path: Any) -> None:
    (tmp_path / "map.yaml").write_text("user: question\nanswer: gold\n")
    columns = load_columns(str(tmp_path / "map.yaml"), ["answer=best"])
    assert columns == Columns(user=("question",), answer=("best",))
    assert load_columns(None, []) is None


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"usr": "q", "answer": "a"}, "did you mean user"),
        ({"answer": "a"}, "say where the prompt is"),
        ({"user": "q"}, "say where the reference answer is"),
        ({"user": 3, "answer": "a"}, "must name a column"),
    ],
)
def test_bad_mappings_are_errors(pairs: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Columns.from_pairs(pairs)


def test_history_with_tool_calls_becomes_text() -> None:
    messages = [
        {"role": "user", "content": "do f"},
        CHAT[1],
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "it is 1", "reasoning_content": "read it"},
    ]
    example = normalise({"messages": messages})
    assert [m["role"] for m in example.messages] == ["user", "assistant", "tool"]
    assert '{"name": "f", "parameters": {"a": 1}}' in example.messages[1]["content"]
    assert example.ground_truth == "<think> read it </think>\n<response> it is 1 </response>"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "NoneType, expected an object"),
        ({"text": "x"}, "no known layout has the columns text"),
        ({"messages": CHAT[:1]}, "at least a prompt and a reference"),
        ({"messages": [CHAT[0], CHAT[0]]}, "not from the assistant"),
        ({"messages": [{"role": "robot", "content": "x"}, CHAT[1]]}, "role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]}, "images are not supported"),
        ({"messages": CHAT, "tools": "[{"}, "tools are not JSON"),
        ({"messages": CHAT, "tools": [{"x": 1}]}, "a tool has no name"),
        ({"prompt": MESSAGES, "reward_model": {"ground_truth": None}}, "ground_truth is NoneType"),
        ({"prompt": [], "reward_model": {"ground_truth": ANSWER}}, "conversation is empty"),
        ({"prompt": " ", "reward_model": {"ground_truth": ANSWER}}, "user message is empty"),
        ({"input": "x\ud800", "output": ANSWER}, "not valid Unicode"),
        (
            {"input": "x", "output": ANSWER, "tools": [{"name": "f", "parameters": {"x": float("nan")}}]},
            "fit into JSON",
        ),
        ({"input": [1], "output": ANSWER}, "a message is int"),
        ({"system": "s", "user": "u", "answer": 3}, "calls are int"),
        ({"system": "s", "user": "u", "answer": None}, "neither tool calls nor a response"),
    ],
)
def test_unusable_rows_say_why(row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        normalise(row)


def test_compact_style_drops_constant_text_only(sft_rows: list[dict[str, Any]]) -> None:
    for row in sft_rows:
        before = normalise(row)
        system, user = prompt_style.apply_style(before.messages, "compact")
        assert "Important Notes" not in system["content"]
        assert system["content"].startswith(prompt_style.ROLE_SENTENCE)
        tools = row["instruction"].split(prompt_style.TOOLS_HEADING)[1].split("\n\n**Steps")[0]
        assert system["content"].endswith(tools)
        assert row["input"].endswith(user["content"])
        assert before.messages[0]["content"] == row["instruction"], "the original must not change"


def test_compact_style_leaves_unknown_instructions() -> None:
    text = SYSTEM.replace("Recall relevant context", "Think hard")
    (system,) = prompt_style.apply_style([{"role": "system", "content": text}], "compact")
    assert "Think hard" in system["content"]
    assert "Important Notes" in system["content"]


def test_slim_style_writes_a_tool_in_one_line() -> None:
    (system,) = prompt_style.apply_style([{"role": "system", "content": SYSTEM}], "slim")
    assert system["content"] == 'Tools:\n{"name": "f", "parameters": {"a": "int"}} does f'
    odd = SYSTEM.replace('{"a": {"type": "int"}}', "not JSON")
    (system,) = prompt_style.apply_style([{"role": "system", "content": odd}], "slim")
    assert system["content"] == "Tools:\n1. Name: f\nDescription: does f\nParameters: not JSON", "as compact"
