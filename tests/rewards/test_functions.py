"""What a foreign reward says is checked: numbers, lengths, names; and it survives the way through JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rest.rewards.functions import Reward, RewardInput, RewardTurn, checked_reward

ANSWER = RewardInput(
    prompt_id="p",
    turns=(RewardTurn(text="a", calls=({"name": "f", "arguments": {}},), call_errors=("bad",)), RewardTurn(text="b")),
    tokens=("a", "b", "c"),
    metadata={"x": [1, None]},
)


@pytest.mark.parametrize(
    "said", [1, 1.0, True, np.float32(1), np.int64(1), torch.ones(()), np.array(1.0), {"value": 1}]
)
def test_numbers_of_every_kind(said: Any) -> None:
    assert checked_reward(said, ANSWER) == Reward(value=1.0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "the reward is None"),
        ("1", "the reward is '1'"),
        (float("nan"), "finite"),
        (10**400, "finite"),
        ([1.0], "of type list"),
        ({"valu": 1}, "has no 'valu': it has value, turns"),
        (Reward(turns=(1.0,)), "turns has 1 numbers, and the answer has 2 turns"),
        (Reward(calls=(1.0, 2.0)), "the answer has 1 calls"),
        ({"tokens": [1, 2, "3"]}, r"tokens\[2\] is '3'"),
        ({"tokens": "abc"}, "expected 3 numbers"),
        (Reward(accuracy=1.5), r"\[0, 1\]"),
        (Reward(is_format_valid="yes"), "expected true, false"),  # type: ignore[arg-type]
        (Reward(parts={"a b": 1.0}), "the name 'a b'"),
        (Reward(parts={"a": float("inf")}), "parts.a is inf"),
        ({"findings": "text"}, "expected a list of texts"),
    ],
)
def test_what_is_no_reward(said: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        checked_reward(said, ANSWER)


def test_all_of_it_through_json() -> None:
    assert RewardInput.from_json(json.loads(json.dumps(ANSWER.to_json()))) == ANSWER
    reward = Reward(
        value=0.5, turns=(1, 2), calls=(3,), tokens=(0, 0, 1), parts={"p": 2}, accuracy=0.5, is_format_valid=True,
        findings=("\ud800" + "x" * 900,),
    )  # fmt: skip
    checked = checked_reward(reward, ANSWER)
    assert checked_reward(json.loads(json.dumps(checked.to_json())), ANSWER) == checked
    assert checked.total == 7.5 and checked.is_fine_grained and len(checked.findings[0]) == 500
