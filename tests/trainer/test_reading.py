"""Rollouts that are read by one rank each: every rank then knows what one alone would have read, bit for bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_rest.trainer.judge as judge_module
from megatron_rest.config import AdvantageConfig, RewardConfig
from megatron_rest.errors import RunError
from megatron_rest.regions import TOOLRL
from megatron_rest.trainer.judge import Judge, Verdict
from megatron_rest.trainer.reading import share_of
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason
from tests.helpers.distributed import run_distributed

TABLE = [bytes([i]) for i in range(256)]
REFERENCE = TOOLRL.write([("w", {"city": "Bern", "days": 3})], thought="t")
ANSWERS = (
    REFERENCE,
    TOOLRL.write([("w", {"city": "Bern", "days": 4})], thought="so"),
    "no",
    "<think>open",
    "bad \udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    TOOLRL.write([("w", {"city": "Rome"}), ("v", {})]),
)


def groups() -> list[RolloutGroup]:
    def rollout(text: str, number: int) -> Rollout:
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return Rollout(
            prompt_id=f"p{number}", token_ids=tokens, log_probs=np.linspace(-1, 0, len(tokens), dtype=np.float32),
            loss_mask=np.arange(len(tokens)) != len(tokens) // 2, stop_reason=StopReason.EOS, policy_version=0,
            reward=0.1 if number == 2 else None,
        )  # fmt: skip

    def prompt(number: int) -> PromptSample:
        truth = "<tool_call>\nnonsense\n</tool_call>" if number == 1 else REFERENCE
        return PromptSample(prompt_id=f"p{number}", token_ids=np.array([113, 10], np.int32), ground_truth=truth)

    return [
        RolloutGroup(prompt=prompt(n), rollouts=tuple(rollout(text * (1 + n), n) for text in ANSWERS)) for n in range(3)
    ]


def verdict() -> tuple[Verdict, int, float]:
    """And how many rollouts this process looked into."""
    judge = Judge(TABLE, reward=RewardConfig(), advantage=AdvantageConfig(), marks_turns=True)
    looked, real = Counter[str](), Judge._regions

    def counted(self: Judge, prompt: np.ndarray, rollout: Rollout) -> np.ndarray:
        looked["regions"] += 1
        return real(self, prompt, rollout)

    Judge._regions = counted  # type: ignore[method-assign]
    try:
        of_step = groups()
        found = judge(of_step, step=3)
        again = judge(of_step[:2], step=3)  # as where prompts are drawn again
    finally:
        Judge._regions = real  # type: ignore[method-assign]
    assert [r.total for r in again.rewards] == [r.total for r in found.rewards[: len(again.rewards)]]
    return found, looked["regions"], judge.waited


def on_a_rank(rank: int, world_size: int) -> tuple[Verdict, int, float]:
    return verdict()


def test_ranks_share_the_reading_and_know_the_same() -> None:
    alone, all_of_it, _ = verdict()
    assert all_of_it == 3 * len(ANSWERS), "judged twice, read once"
    results = run_distributed(on_a_rank, 3)
    assert [looked for _, looked, _ in results] == [len(ANSWERS)] * 3
    for found, _, _ in results:
        assert found.rewards == alone.rewards and found.static_rewards == alone.static_rewards
        assert found.is_zero_group == alone.is_zero_group and found.scored_rewards == alone.scored_rewards
        for ours, theirs in zip(found.samples, alone.samples, strict=True):
            for field in fields(ours):
                one, other = getattr(ours, field.name), getattr(theirs, field.name)
                if isinstance(other, np.ndarray):
                    assert one.dtype == other.dtype
                    np.testing.assert_array_equal(one, other)
                else:
                    assert one == other


def fails_on_one(rank: int, world_size: int) -> tuple[str, str, bool]:
    def reward(text: str, *args: Any, **options: Any) -> Any:
        if rank == 1:
            raise IndexError("no such call")
        return real(text, *args, **options)

    real, judge_module.tool_call_reward = judge_module.tool_call_reward, reward
    try:
        verdict()
    except Exception as error:  # noqa: BLE001  what it is, is the question
        return type(error).__name__, str(error), isinstance(error, RunError)
    return "", "", False


def test_what_fails_on_one_rank_ends_all() -> None:
    first, second = run_distributed(fails_on_one, 2)
    assert second == ("IndexError", "no such call", False)
    assert first == ("RunError", "rank 1 could not judge what it was given: IndexError: no such call", True)


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_shares_are_a_partition_and_even(lengths: list[int], world_size: int) -> None:
    shares = [share_of(lengths, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", [1, 64])
def test_a_rank_of_many_reads_little(world_size: int) -> None:
    assert len(share_of([100] * 640, rank=0, world_size=world_size)) == 640 // world_size
