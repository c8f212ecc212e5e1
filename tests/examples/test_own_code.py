"""The package of one's own that the documents show: what its reward and its environment do.

It trains in tests/trainer/test_run.py, from a folder outside the checkout, and as a job ships it in tests/cluster.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_rest.config import ConfigError, RestConfig, load
from megatron_rest.regions import TOOLRL
from megatron_rest.rewards.functions import RewardInput, RewardTurn, checked_reward
from megatron_rest.rollout.conversations import find_environment
from megatron_rest.rollout.environments.base import Answer
from megatron_rest.rollout.environments.calls import Call, ParsedCalls
from megatron_rest.types import PromptSample
from megatron_rest.user_code import load_named, named_code

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_code"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mytools"]:
        monkeypatch.delitem(sys.modules, name)


def configured(*settings: str) -> RestConfig:
    return load(None, settings)


def test_its_reward_pays_for_each_call() -> None:
    config = configured("reward.function=mytools.rewards:calls_match", "reward.arguments.extra=-2.0")
    [named] = named_code(config)
    made = {"name": "f", "arguments": {"a": 1}}
    turn = RewardTurn(text="", calls=(made, {"name": "g", "arguments": {}}, made))
    answer = RewardInput(
        prompt_id="p", turns=(turn,), reference=TOOLRL.write([("f", {"a": 1}), ("h", {})], thought="t")
    )
    reward = checked_reward(load_named(named)(answer, **named.arguments), answer)
    assert reward.calls == (1.0, -2.0, -2.0) and reward.total == -3.0
    assert reward.parts == {"missing": 1.0, "made": 3.0} and len(reward.findings) == 2


def test_its_environment_reads_the_tools_of_the_row() -> None:
    tool = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    config = configured("rollout.environment=mytools.environments:Workshop", "rollout.environment_arguments.tries=3")
    prompt = PromptSample(
        prompt_id="p", token_ids=np.zeros(1, np.int32), ground_truth="", tools_json=json.dumps([tool]),
        metadata_json=json.dumps({"strict": True}),
    )  # fmt: skip
    workshop = find_environment(config.rollout.environment, config.rollout.environment_arguments)(prompt)
    workshop.reset()
    calls = (Call("f", {"a": 1}), Call("f", {"b": 1}), Call("g", {}))
    seen = workshop.step(Answer(text="", calls=ParsedCalls(calls=calls), turn=0))
    said = [message.content for message in seen.messages]
    assert said == ["f: done", "f: it has no parameter b", "g: there is no such tool"]
    assert workshop.step(Answer(text="done", calls=ParsedCalls(), turn=1)).done
    assert workshop.reward() == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="'trys'"):
        find_environment(config.rollout.environment, {"trys": 3})
