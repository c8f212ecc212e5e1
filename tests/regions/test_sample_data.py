"""On real answers: as many runs of TOOL_NAME as calls the reward parses, and their text is the calls' names."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rest.regions import TokenRegion, label_regions
from megatron_rest.rewards import ToolCallError, parse_tool_calls
from tests.regions.golden import pieces
from tests.regions.samples import sample_answers


def runs(tokens: list[bytes], region: TokenRegion) -> list[bytes]:
    """The bytes of each maximal run of ``region``."""
    inside = label_regions(tokens) == region
    edges = np.flatnonzero(np.diff(np.concatenate(([0], inside.astype(np.int8), [0])))).reshape(-1, 2)
    return [b"".join(tokens[a:b]) for a, b in edges]


@pytest.mark.parametrize("by_byte", [False, True])
def test_name_runs_are_the_parsed_calls(by_byte: bool) -> None:
    num_calls = 0
    for answer in sample_answers():
        tokens = [bytes([b]) for b in answer.encode()] if by_byte else pieces(answer)
        try:
            calls = parse_tool_calls(answer)
        except ToolCallError:
            calls = ()
        names = runs(tokens, TokenRegion.TOOL_NAME)
        assert [json.loads(b'"' + name + b'"') for name in names] == [call.name for call in calls]
        if by_byte:  # arguments of single-byte tokens are exactly the JSON of the parameters
            args = runs(tokens, TokenRegion.TOOL_ARGS)
            assert [json.loads(a) for a in args] == [call.parameters for call in calls]
        num_calls += len(calls)
    assert num_calls > 300


def test_thoughts_that_mention_the_tag_are_in_the_sample() -> None:
    """The case that breaks regular expressions over the whole text really occurs."""
    mentions = [a for a in sample_answers() if "<tool_call>" in a.partition("</think>")[0]]
    assert len(mentions) >= 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
parameters = st.dictionaries(
    st.sampled_from(["name", "parameters", "arguments", "k"]) | st.text(max_size=5), json_values
)
generated_calls = st.lists(
    st.tuples(st.text(min_size=1, max_size=8), parameters, st.booleans()), min_size=1, max_size=4
)


@pytest.mark.parametrize("num_cases", [100, pytest.param(500, marks=pytest.mark.extended)])
def test_name_runs_are_the_parsed_calls_of_any_valid_answer(num_cases: int) -> None:
    thoughts = st.sampled_from(["q", "a <tool_call> b", '{"name": "x"}'])
    check = given(calls=generated_calls, ascii_only=st.booleans(), thought=thoughts)(check_name_runs)
    settings(max_examples=num_cases, deadline=None, derandomize=True)(check)()


def check_name_runs(calls: list[tuple[str, dict[str, object], bool]], ascii_only: bool, thought: str) -> None:
    lines = []
    for name, values, name_first in calls:
        items = [("name", name), ("parameters", values)]
        lines.append(json.dumps(dict(items if name_first else items[::-1]), ensure_ascii=ascii_only))
    answer = f"<think>{thought}</think>\n<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"
    raw = answer.encode(errors="surrogatepass")
    tokens = [raw[i : i + 1] for i in range(len(raw))]
    assert len(parse_tool_calls(answer)) == len(calls)
    names = [json.loads(b'"' + name + b'"') for name in runs(tokens, TokenRegion.TOOL_NAME)]
    assert names == [name for name, _, _ in calls]
    assert [json.loads(args) for args in runs(tokens, TokenRegion.TOOL_ARGS)] == [values for _, values, _ in calls]
