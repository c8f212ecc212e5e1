"""Reference answers and tool lists, by hand-written cases."""

from __future__ import annotations

import pytest

from data_tools import answers
from data_tools.calls import read_call
from data_tools.errors import RowError
from data_tools.tool_lists import toolrl_list

CALL = '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>'


def test_calls_and_response_are_found() -> None:
    answer = answers.parse_answer(CALL + "\n<response> hello </response>")
    assert answer.think == "t"
    assert answer.calls == [{"name": "f", "parameters": {"a": 1}}]
    assert answer.response == "hello"


def test_a_thought_may_mention_the_tags() -> None:
    answer = answers.parse_answer(CALL.replace(" t ", " I will use <tool_call> with <response> "))
    assert answer.calls == [{"name": "f", "parameters": {"a": 1}}]
    assert answer.response is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("42", "neither <tool_call> nor <response>"),
        ("<tool_call>\n</tool_call>", "empty <tool_call>"),
        ("<tool_call>\n{}\n</tool_call>", "has no name"),
        ('<tool_call>\n{"name": "f", "parameters": [1]}\n</tool_call>', "expected an object"),
        ('<tool_call>\n{"name": "f", "parameters": {"a": NaN}}\n</tool_call>', "is not JSON"),
        ("<tool_call>\n{'name': 'f'}\n</tool_call>", "is not JSON"),
        ('<tool_call>\n{"name": "f"}', "never closes"),
    ],
)
def test_unreadable_references_are_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        answers.parse_answer(text)


def test_openai_calls_become_plain_calls() -> None:
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": [1, null]}'}}
    assert read_call(call) == {"name": "f", "parameters": {"a": [1, None]}}


def test_compose_is_the_inverse_of_parse() -> None:
    calls = [{"name": "f", "parameters": {"ä": "ö"}}, {"name": "g", "parameters": {}}]
    answer = answers.parse_answer(answers.compose_answer(calls, think="why", response="so"))
    assert (answer.calls, answer.think, answer.response) == (calls, "why", "so")


def test_shorten_thought_keeps_the_rest() -> None:
    text = CALL.replace(" t ", " one two three\nfour ")
    assert answers.shorten_thought(text, 2) == CALL.replace(" t ", " one two ")
    assert answers.shorten_thought(text, 4) == text


SYSTEM = """You help.

**Available Tools**
In your response, you can use the following tools:
1. Name: Weather
Description: Say the weather.
Parameters: {"city": {"type": "string"}}
2. QueryMeeting: Details: all of them.
Parameters: {'user': {'type': 'str'}}
3. Name: Odd
Description: two
lines
Parameters: not a dict

**Steps for Each Turn**
1. **Think:** no tool"""


def test_tool_lists_of_all_three_spellings() -> None:
    assert toolrl_list(SYSTEM) == [
        {"name": "Weather", "description": "Say the weather.", "parameters": {"city": {"type": "string"}}},
        {"name": "QueryMeeting", "description": "Details: all of them.", "parameters": {"user": {"type": "str"}}},
        {"name": "Odd", "description": "two\nlines", "parameters": "not a dict"},
    ]
    assert toolrl_list("no list") == []
