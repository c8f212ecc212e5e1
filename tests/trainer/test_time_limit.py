"""Judging that does not end, or fails, is ended and named; nothing of it is left behind."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import numpy as np
import pytest

from megatron_rest.config import AdvantageConfig, RewardConfig
from megatron_rest.trainer import judge as judge_module
from megatron_rest.trainer.judge import Judge
from megatron_rest.trainer.time_limit import JudgingTooLongError, time_limit
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason


def loop(*_: Any, **__: Any) -> None:
    while True:
        pass


def backtrack(*_: Any, **__: Any) -> None:
    re.match(r"(a|a)*b", "a" * 60)


def crash(*_: Any, **__: Any) -> None:
    raise IndexError("no such call")


GROUP = RolloutGroup(
    prompt=PromptSample(prompt_id="p7", token_ids=np.zeros(1, np.int32), ground_truth=""),
    rollouts=(
        Rollout(
            prompt_id="p7",
            token_ids=np.array([104, 105], np.int32),
            log_probs=np.zeros(2, np.float32),
            loss_mask=np.ones(2, bool),
            stop_reason=StopReason.EOS,
            policy_version=0,
        ),
    ),
)


def make_judge(seconds: float) -> Judge:
    config = RewardConfig(timeout_seconds=seconds)
    return Judge([bytes([i]) for i in range(256)], reward=config, advantage=AdvantageConfig())


@pytest.mark.parametrize("reward", [loop, backtrack])
def test_an_answer_that_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch, reward: Any) -> None:
    monkeypatch.setattr(judge_module, "tool_call_reward", reward)
    with pytest.raises(
        JudgingTooLongError, match=r"judging rollout 0 of prompt p7 in step 3 took longer than 0.2 s"
    ) as e:
        make_judge(0.2)([GROUP], step=3)
    assert e.value.__notes__ == ["judging rollout 0 of prompt p7 in step 3: 'hi'"]


def test_an_answer_that_cannot_be_judged_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "tool_call_reward", crash)
    with pytest.raises(IndexError, match="no such call") as error:
        make_judge(600.0)([GROUP], step=3)
    assert error.value.__notes__ == ["judging rollout 0 of prompt p7 in step 3: 'hi'"]


def test_timer_and_handler_are_put_back() -> None:
    heard: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda signum, frame: heard.append(signum))
    before = signal.setitimer(signal.ITIMER_REAL, 300.0)
    try:
        with time_limit(600.0, "nothing"):
            pass
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300.0
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        deadline = time.monotonic() + 60
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heard == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)
