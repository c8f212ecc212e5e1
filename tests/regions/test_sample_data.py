"""On real answers: as many runs of TOOL_NAME as calls the reward parses, and their text is the calls' names."""

from __future__ import annotations

import json

import numpy as np
import pytest

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
