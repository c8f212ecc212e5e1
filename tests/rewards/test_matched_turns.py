"""Turn rewards from matched calls, against the arithmetic of MatchTIR's code written out."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rest.regions import TOOLRL
from megatron_rest.rewards.functions import RewardInput, RewardTurn, checked_reward
from megatron_rest.rewards.matched_turns import matched_turns

WANTED = [("f", {"a": 1, "b": 2}), ("g", {}), ("f", {"a": 3})]


def judged(*turns: list[tuple[str, dict[str, Any]]], **options: float) -> tuple[float, ...]:
    made = tuple(RewardTurn(text="", calls=tuple({"name": n, "arguments": p} for n, p in calls)) for calls in turns)
    answer = RewardInput(prompt_id="p", turns=made, reference=TOOLRL.write(WANTED, thought="t"))
    return checked_reward(matched_turns(answer, **options), answer).turns


@pytest.mark.parametrize(
    ("turns", "want"),
    [
        ([WANTED, []], (1.0, 0.0)),
        ([[WANTED[2]], [WANTED[1]], [WANTED[0]]], (1.0, 1.0, 1.0)),
        # names 1 + Jaccard {a} of {a, b} 1/2 + one value, of 2 + 2; but {"a": 1} is as like to the third: 1 + 1 of 3
        ([[("f", {"a": 1})]], (2 / 3,)),
        ([[("f", {"a": 1}), ("f", {"a": 3})]], ((2.5 / 4 + 1.0) / 2,)),
        ([[("F", {"a": 1})], [("g", {}), ("g", {})]], (0.0, 0.5)),
        ([[("f", {})]], (1 / 3,)),
    ],
)
def test_turns_earn_what_their_calls_match(turns, want):
    assert judged(*turns) == pytest.approx(want, abs=1e-15)


def test_what_matches_nothing_may_cost():
    assert judged([("h", {})], [("g", {}), ("h", {})], unmatched=-0.5) == (-0.5, 0.25)
