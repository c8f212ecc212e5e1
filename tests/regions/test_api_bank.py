"""The 597 answers of API-Bank: as many runs of TOOL_NAME as calls the reward parses, alone and several in a turn."""

from __future__ import annotations

import gzip
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_rest.regions import TokenRegion
from megatron_rest.rewards import parse_tool_calls
from tests.regions.golden import pieces
from tests.regions.test_sample_data import runs

FILE = Path(__file__).parent / "api_bank" / "answers.json.gz"
ROWS = {1: 399, 2: 67, 3: 131}


@cache
def api_bank_calls() -> list[tuple[int, dict[str, Any]]]:
    """(level, call) of every row."""
    rows = json.loads(gzip.decompress(FILE.read_bytes()))
    calls = [(row["level"], row["answer"] if isinstance(row["answer"], list) else [row["answer"]]) for row in rows]
    assert all(len(answer) == 1 for _, answer in calls)
    return [(level, answer[0]) for level, answer in calls]


def turn(calls: list[dict[str, Any]], *, key: str, name_first: bool) -> str:
    """The calls as a policy writes them, one JSON object a line."""
    lines = []
    for call in calls:
        items = [("name", call["name"]), (key, call["parameters"])]
        lines.append(json.dumps(dict(items if name_first else items[::-1]), ensure_ascii=False))
    return "<think>I need a tool.</think>\n<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


def test_fixture_is_the_noted_one() -> None:
    notice = (FILE.parent / "NOTICE.md").read_text()
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() in notice
    assert "Copyright (c) 2022 Alibaba Research" in notice
    levels = [level for level, _ in api_bank_calls()]
    assert {level: levels.count(level) for level in ROWS} == ROWS
    assert len(levels) == 597


@pytest.mark.parametrize("in_a_turn", [1, 3])
@pytest.mark.parametrize("key", ["parameters", "arguments"])
@pytest.mark.parametrize("name_first", [True, False])
def test_name_runs_are_the_parsed_calls(in_a_turn: int, key: str, name_first: bool) -> None:
    calls = [call for _, call in api_bank_calls()]
    for start in range(0, len(calls), in_a_turn):
        mine = calls[start : start + in_a_turn]
        answer = turn(mine, key=key, name_first=name_first)
        parsed = parse_tool_calls(answer)
        assert [(c.name, c.parameters) for c in parsed] == [(c["name"], c["parameters"]) for c in mine]
        names = [call["name"] for call in mine]
        raw = answer.encode()
        by_byte = [raw[i : i + 1] for i in range(len(raw))]
        for tokens in (by_byte, pieces(answer)):
            assert [json.loads(b'"' + name + b'"') for name in runs(tokens, TokenRegion.TOOL_NAME)] == names
        arguments = [json.loads(found) for found in runs(by_byte, TokenRegion.TOOL_ARGS)]
        assert arguments == [call["parameters"] for call in mine]
