"""The judge where prompts have written part of the answer, in dialects, and without a readable reference."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rest.config import AdvantageConfig, RewardConfig
from megatron_rest.regions import HERMES, QWEN3_CODER, TOOLRL, Dialect, TokenRegion
from megatron_rest.trainer.judge import Judge
from megatron_rest.trainer.step_metrics import reward_metrics
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason, TrainSample, TurnMark

BYTES = [bytes([i]) for i in range(256)]
END, EOS = 256, 257  # two tokens that end a turn
TABLE = [*BYTES, b"<|im_end|>", b"<|odd_end|>"]
REFERENCE = TOOLRL.write([("w", {"city": "Bern"})], thought="t")


def ids(text: str, *ends: int) -> np.ndarray:
    return np.array([*text.encode(), *ends], np.int32)


def judged(
    prompt: str, parts: list[tuple[np.ndarray, bool]], *, dialect: Dialect = TOOLRL, truth: str = REFERENCE
) -> tuple[object, np.ndarray]:
    tokens = np.concatenate([part for part, _ in parts])
    mask = np.concatenate([np.full(len(part), sampled) for part, sampled in parts])
    rollout = Rollout(
        prompt_id="p",
        token_ids=tokens,
        log_probs=np.zeros(len(tokens), np.float32),
        loss_mask=mask,
        stop_reason=StopReason.EOS,
        policy_version=0,
    )
    sample = PromptSample(prompt_id="p", token_ids=ids(prompt), ground_truth=truth)
    judge = Judge(
        TABLE,
        reward=RewardConfig(schedule=False),
        advantage=AdvantageConfig(),
        dialect=dialect,
        stop_token_ids=(END, EOS),
    )
    verdict = judge([RolloutGroup(prompt=sample, rollouts=(rollout,))], step=1)
    return verdict.rewards[0], verdict.samples[0].region_ids[len(prompt.encode()) :]


@pytest.mark.parametrize("dialect", [TOOLRL, HERMES, QWEN3_CODER], ids=lambda d: d.name)
@pytest.mark.parametrize(
    ("prefix", "begins"),
    [("<think>\n", "hm\n</think>\n\n"), ("<think>\n\n</think>\n\n", ""), ("", "<think>hm</think>")],
)
def test_the_prompts_last_tokens_say_what_the_answer_begins_with(dialect: Dialect, prefix: str, begins: str) -> None:
    answer = begins + dialect.write([("w", {"city": "Bern"})])
    reward, regions = judged(f"user\nq\nassistant\n{prefix}", [(ids(answer, END), True)], dialect=dialect)
    assert reward.total == 4.0, reward.detail
    thought = [chr(t) for t, r in zip(answer.encode(), regions, strict=False) if r == TokenRegion.THINK]
    assert "".join(thought).strip() == ("hm" if "hm" in begins else "")
    assert regions[-1] == TokenRegion.FORMAT


def test_every_turn_is_labelled_by_its_own_prompt() -> None:
    first = ids('hm</think><tool_call>{"name": "f", "arguments": {}}</tool_call>', END)
    tool, second = ids("obs <think> assistant\n<think>\n"), ids("so</think>Done.", END)
    _, regions = judged("q<think>\n", [(first, True), (tool, False), (second, True)], dialect=HERMES)
    assert regions[:2].tolist() == [TokenRegion.THINK] * 2
    at = len(first) + len(tool)
    assert not regions[len(first) : at].any()
    assert regions[at : at + 2].tolist() == [TokenRegion.THINK] * 2
    assert regions[at + len("so</think>") : -1].tolist() == [TokenRegion.RESPONSE] * len("Done.")
    _, regions = judged("q<think>\n", [(first, True), (ids("obs\nassistant\n"), False), (second, True)], dialect=HERMES)
    assert TokenRegion.THINK not in regions[len(first) :]


def test_a_stop_token_that_no_dialect_knows_is_glue_and_no_text() -> None:
    answer = TOOLRL.write([("w", {"city": "Bern"})], thought="t")
    reward, regions = judged("q", [(ids(answer, EOS), True)])
    assert reward.total == 4.0 and regions[-1] == TokenRegion.FORMAT
    spoken, regions = judged("q", [(ids("Hi.", EOS), True)], dialect=HERMES, truth="<response> Hi. </response>")
    assert spoken.is_format_valid and regions.tolist() == [TokenRegion.RESPONSE] * 3 + [TokenRegion.FORMAT]


def test_a_reference_that_cannot_be_read_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    reward, _ = judged("q", [(ids("x", END), True)], truth="<tool_call>\nnonsense\n</tool_call>")
    assert (reward.total, reward.accuracy) == (0.0, 0.0) and "cannot be parsed" in reward.detail[0]
    assert "its rollouts get reward 0" in caplog.text


def test_what_infrastructure_ended_carries_no_loss_and_is_compared_with_nobody() -> None:
    """Its zero reward would be a good one among answers that earn less."""
    good, bad = REFERENCE, "no"
    ends = [StopReason.EOS, StopReason.EOS, StopReason.TOOL_FAILED, StopReason.TOOL_TIMEOUT, StopReason.ABORTED]

    def rollout(text: str, reason: StopReason) -> Rollout:
        tokens = ids(text, END)
        return Rollout(
            prompt_id="p", token_ids=tokens, log_probs=np.zeros(len(tokens), np.float32),
            loss_mask=np.ones(len(tokens), bool), stop_reason=reason, policy_version=0,
            reward=0.0 if reason.is_infrastructure else None,
        )  # fmt: skip

    sample = PromptSample(prompt_id="p", token_ids=ids("q"), ground_truth=REFERENCE)
    judge = Judge(TABLE, reward=RewardConfig(schedule=False), advantage=AdvantageConfig(), stop_token_ids=(END,))
    group = RolloutGroup(prompt=sample, rollouts=tuple(map(rollout, (good, bad, bad, good, good), ends)))
    alone = RolloutGroup(prompt=sample, rollouts=group.rollouts[1:3])
    verdict = judge([group, alone], step=1)
    advantages = [s.advantage for s in verdict.samples]
    assert advantages[0] == -advantages[1] == pytest.approx(np.sqrt(0.5), rel=1e-5)
    assert advantages[2:] == [0.0] * 5, "one that is left has nobody to be compared with"
    assert verdict.is_judged == (True, True, False, False, False, True, False)
    assert [bool(s.loss_mask.any()) for s in verdict.samples] == list(verdict.is_judged)
    assert verdict.is_zero_group == (False, True)
    values = reward_metrics(verdict, num_groups=2)
    assert values["reward/total"] == pytest.approx(np.mean([verdict.rewards[i].total for i in (0, 1, 5)]))
    assert values["reward/not_judged"] == pytest.approx(4 / 7)


def test_turns_that_are_wrong_in_form_are_marked() -> None:
    good = ids(TOOLRL.write([("w", {"city": "Bern"})], thought="t"), END)
    broken, endless = ids("<think>t</think><tool_call>{nonsense}</tool_call>", END), ids("<think>and on and on")
    tool = ids("obs")
    parts = [(good, True), (tool, False), (broken, True), (tool, False), (endless, True)]
    tokens = np.concatenate([part for part, _ in parts])
    rollout = Rollout(
        prompt_id="p",
        token_ids=tokens,
        log_probs=np.zeros(len(tokens), np.float32),
        loss_mask=np.concatenate([np.full(len(part), sampled) for part, sampled in parts]),
        stop_reason=StopReason.LENGTH,
        policy_version=0,
    )
    group = RolloutGroup(
        prompt=PromptSample(prompt_id="p", token_ids=ids("q"), ground_truth=REFERENCE), rollouts=(rollout,)
    )

    def sample(**options: object) -> TrainSample:
        judge = Judge(TABLE, reward=RewardConfig(), stop_token_ids=(END,), **{"advantage": AdvantageConfig()} | options)  # type: ignore[arg-type]
        return judge.sample(group, rollout, advantage=1.0, sequence_id=0)

    assert sample().marks is None, "nobody asked"
    marks = sample(marks_turns=True).marks
    assert marks is not None
    want = [(good, 0), (tool, 0), (broken, TurnMark.CALLS), (tool, 0), (endless, TurnMark.THOUGHT)]
    assert marks.tolist() == [0] + [int(mark) for part, mark in want for _ in part]
    assert sample().loss_mask.any()
    assert not sample(advantage=AdvantageConfig(mask_truncated=True)).loss_mask.any(), "it was cut"


def test_overlong_answers_lose_reward_before_advantages() -> None:
    def rollout(length: int) -> Rollout:
        return Rollout(
            prompt_id="p",
            token_ids=np.full(length, ord("a"), np.int32),
            log_probs=np.zeros(length, np.float32),
            loss_mask=np.ones(length, bool),
            stop_reason=StopReason.EOS,
            policy_version=0,
            reward=1.0,
        )

    prompt = PromptSample(prompt_id="p", token_ids=ids("q"), ground_truth=REFERENCE)
    config = AdvantageConfig(estimator="dr_grpo", overlong_buffer=4, overlong_penalty=2.0)
    judge = Judge(TABLE, reward=RewardConfig(), advantage=config, max_response_tokens=10)
    verdict = judge([RolloutGroup(prompt=prompt, rollouts=tuple(map(rollout, (5, 6, 8, 10))))], step=1)
    assert verdict.scored_rewards == (1.0, 1.0, 0.0, -1.0)
    assert [reward.total for reward in verdict.rewards] == [1.0] * 4, "what is reported is the reward"
    assert [s.advantage for s in verdict.samples] == [0.75, 0.75, -0.25, -1.25]
