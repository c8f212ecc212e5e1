"""The reward on golden cases, its variants, its findings, and hostile answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rest.config import ConfigError, RewardConfig
from megatron_rest.rewards import ToolCallError, judge_answer, parse_tool_calls, reward_ranges, tool_call_reward
from megatron_rest.types import TokenRegion
from tests.rewards.cases import CASES, OK, ONE, SPEAK, STEPS, THOUGHT, TWO, Case, F, G, calls

PUBLISHED = RewardConfig(accept_arguments=False)  # the published reward scores "arguments" as a failure
STATIC = replace(PUBLISHED, schedule=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: Case) -> None:
    static = tool_call_reward(case.answer, case.reference, step=0, config=STATIC)
    assert (static.format, static.correctness) == pytest.approx(case.static, abs=1e-6)
    totals = [tool_call_reward(case.answer, case.reference, step=step, config=PUBLISHED).total for step in STEPS]
    assert totals == pytest.approx(case.dynamic, abs=5e-5)
    assert static.is_format_valid == (case.static[0] == 1)
    assert static.total == static.format + static.correctness
    perfect = static.is_format_valid and static.accuracy == 1.0
    assert perfect == (not static.detail)


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "arguments key"], ids=lambda case: case.name)
def test_defaults_agree_with_the_published_reward_elsewhere(case: Case) -> None:
    for step, expected in zip(STEPS, case.dynamic, strict=True):
        assert tool_call_reward(case.answer, case.reference, step=step).total == pytest.approx(expected, abs=5e-5)


def test_arguments_are_accepted_by_default() -> None:
    reward = tool_call_reward(ONE.replace("parameters", "arguments"), ONE, step=1)
    assert reward.accuracy == 1.0
    assert tool_call_reward(ONE, ONE.replace("parameters", "arguments"), step=1).accuracy == 1.0


@pytest.mark.parametrize(
    "end", ["<|im_end|>", "<|im_end|>\n", "<|endoftext|>", "<|eot_id|>", "  \n", "<|im_end|><think>x"]
)
def test_the_end_of_turn_is_stripped(end: str) -> None:
    strict = replace(STATIC, strict_format=True)
    assert tool_call_reward(ONE + end, ONE, step=0, config=strict).total == 4


def test_the_prompt_may_have_opened_the_thought() -> None:
    rest = ONE.removeprefix("<think>")
    assert tool_call_reward(rest, ONE, step=0, config=STATIC).total == 3
    assert tool_call_reward(rest, ONE, step=0, config=STATIC, starts_in_think=True).total == 4


def test_accuracy_does_not_depend_on_the_schedule() -> None:
    answer = calls(OK.replace('"x"', '"y"'))
    assert {
        tool_call_reward(answer, ONE, step=s, config=c).accuracy for s in (0, 50, 500) for c in (PUBLISHED, STATIC)
    } == {0.75}


def test_accuracy_without_reference_calls_asks_for_none() -> None:
    assert tool_call_reward(SPEAK, SPEAK, step=0).accuracy == 1.0
    assert tool_call_reward(ONE + SPEAK, SPEAK, step=0).accuracy == 0.0


def test_opaque_thought_ignores_mentioned_tags() -> None:
    answer = calls(OK, thought="<think>use the <tool_call> tag, not <response></think>\n")
    assert tool_call_reward(answer, ONE, step=0).total == -4
    assert tool_call_reward(answer, ONE, step=0, config=RewardConfig(opaque_thought=True)).total == 4
    assert len(parse_tool_calls(answer)) == 1
    for before in ("Well. ", "<think>a <response></think>"):
        assert tool_call_reward(before + answer, ONE, step=0, config=RewardConfig(opaque_thought=True)).total == 4
    unclosed = answer.replace("</think>", "")
    assert tool_call_reward(unclosed, ONE, step=0, config=RewardConfig(opaque_thought=True)).total == -4


def test_findings_point_at_the_call() -> None:
    answer = calls('{"name": "h", "parameters": {}}', '{"name": "g", "parameters": {"b": 3, "c": 4}}')
    judgement = judge_answer(answer, TWO, config=RewardConfig())
    found = [(f.region, f.call, f.message) for f in judgement.findings]
    assert found == [
        (TokenRegion.TOOL_NAME, None, 'no matching call of "f"'),
        (TokenRegion.TOOL_ARGS, 1, 'parameter "b": expected 2, got 3'),
        (TokenRegion.TOOL_ARGS, 1, 'parameter "c" is not wanted'),
        (TokenRegion.TOOL_NAME, 0, 'call of "h" matches no reference call'),
    ]
    detail = tool_call_reward(answer, TWO, step=0).detail
    assert detail[1] == 'tool_args of call 1: parameter "b": expected 2, got 3'


class TestStrictFormat:
    STRICT = RewardConfig(strict_format=True, schedule=False)

    @pytest.mark.parametrize("text", [ONE, TWO])
    def test_exact_layout_passes(self, text: str) -> None:
        assert tool_call_reward(text, text, step=0, config=self.STRICT).is_format_valid

    def test_both_sections_and_thought_only(self) -> None:
        both = ONE + "\n<response>hi</response>"
        assert tool_call_reward(both, both, step=0, config=self.STRICT).is_format_valid
        assert tool_call_reward("<think>a</think>", "<think>b</think>", step=0, config=self.STRICT).is_format_valid

    @pytest.mark.parametrize("answer", ["Well. " + ONE, ONE + " Done.", ONE.replace("</think>\n", "</think>")])
    def test_anything_else_fails(self, answer: str) -> None:
        assert not tool_call_reward(answer, ONE, step=0, config=self.STRICT).is_format_valid
        assert tool_call_reward(answer, ONE, step=0, config=STATIC).is_format_valid


class TestSchedule:
    def test_bounds(self) -> None:
        for step in (0, 1, 75, 105, 150, 1000):
            r = reward_ranges(step, RewardConfig())
            assert r.format_pass == pytest.approx(max(1, 2 - step / 150))
            assert r.format_fail == pytest.approx(min(-1, -2 + step / 75))
            assert r.correctness_max == pytest.approx(min(3, 2 + step / 150))
            assert r.correctness_min == pytest.approx(max(-3, -2 - step / 150))
            assert r.format_pass + r.correctness_max == pytest.approx(4)

    def test_other_lengths_and_ranges(self) -> None:
        assert reward_ranges(50, RewardConfig(schedule_steps=100)).correctness_max == 2.5
        narrow = RewardConfig(correctness_range=1.0)  # CORRECTMAX1
        assert [reward_ranges(s, narrow).correctness_max for s in (0, 75, 150, 900)] == [2, 1.5, 1, 1]
        assert reward_ranges(0, replace(narrow, schedule=False)).correctness_min == -1
        with pytest.raises(ValueError, match="step is -1"):
            reward_ranges(-1, RewardConfig())

    def test_two_stage(self) -> None:
        config = RewardConfig(two_stage=True, schedule=False)
        early, late = reward_ranges(29, config), reward_ranges(30, config)
        assert (early.format_pass, early.correctness_max) == (1, 1)
        assert (late.format_pass, late.correctness_max) == (0.5, 3)


class TestGranularity:
    @staticmethod
    def accuracy(answer: str, reference: str, granularity: str) -> float:
        return tool_call_reward(answer, reference, step=0, config=RewardConfig(granularity=granularity)).accuracy

    def test_coarse(self) -> None:
        assert self.accuracy(ONE, ONE, "coarse") == 1
        assert self.accuracy(calls(G, F), TWO, "coarse") == 0

    def test_exact_sets(self) -> None:
        assert self.accuracy(calls(OK.replace('"x"', '"x", "c": 3')), ONE, "exact_sets") == pytest.approx(3 / 4)
        assert self.accuracy(calls(G, F), TWO, "exact_sets") == pytest.approx((0 + 2 + 2) / 5)  # the order counts

    def test_whole_calls(self) -> None:
        assert self.accuracy(calls(F), TWO, "whole_calls") == pytest.approx((0.5 + 1) / 3)
        assert self.accuracy(calls(OK.replace('"x"', '"y"')), ONE, "whole_calls") == pytest.approx((1 + 0) / 2)

    def test_unknown(self) -> None:
        with pytest.raises(ConfigError, match="granularity"):
            RewardConfig(granularity="rough")


def test_length_bonus() -> None:
    long = "<think>" + "w " * 256 + "</think>\n"
    config = RewardConfig(length_bonus=True, schedule=False)
    assert tool_call_reward(calls(OK, thought=long), ONE, step=0, config=config).total == 4.5
    scheduled = replace(config, length_schedule=True)
    assert tool_call_reward(calls(OK, thought=long), ONE, step=105, config=scheduled).total == 4.4
    assert tool_call_reward(calls(OK, thought=""), ONE, step=0, config=config).total == 3


def test_repeated_calls_and_parameters_are_matched_once() -> None:
    reference = calls(F, F)
    assert tool_call_reward(calls(F), reference, step=0).accuracy == pytest.approx((0.5 + 2) / 5)
    best = calls('{"name": "f", "parameters": {"a": 2}}', F)  # the better of two candidates is taken
    assert tool_call_reward(best, calls(F), step=0).accuracy == pytest.approx((0.5 + 2) / 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "is a list, expected an object"),
        ('{"name": "f"}', "has no parameters"),
        ('{"parameters": {}}', "has no name"),
        ('{"name": "f", "parameters": [1]}', "parameters are a list"),
        ('{"name": "f", "parameters": {"a": NaN}}', "NaN is not JSON"),
        ('{"name": "f", "parameters": ' + '{"a": ' * 40 + "1" + "}" * 41, "nested deeper than 32"),
        ("[" * 100_000, "more than 65536"),
        ('{"name": "f", "parameters": {"a": ' + "9" * 5000 + "}}", "is not JSON"),
        ('__import__("os").system("true")', "is not JSON"),
    ],
)
def test_hostile_lines_score_the_minimum(line: str, message: str) -> None:
    reward = tool_call_reward(calls(line), ONE, step=0)
    assert reward.correctness == -2
    assert message in reward.detail[-1]
    with pytest.raises(ToolCallError):
        parse_tool_calls(calls(line))


def test_names_that_are_no_strings_do_not_raise() -> None:
    answer = calls('{"name": ["f"], "parameters": {}}', OK)
    assert tool_call_reward(answer, ONE, step=0).accuracy == pytest.approx((0.5 + 3) / 4)


def test_a_bad_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="reference answer cannot be parsed"):
        tool_call_reward(ONE, calls("nonsense"), step=0)


FRAGMENTS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<response>",
    "</response>",
    OK,
    F,
    "\n",
    '"',
    "{",
    "[",
    "x",
]


@pytest.mark.parametrize("num_cases", [300, pytest.param(1000, marks=pytest.mark.extended)])
def test_no_answer_raises_and_every_reward_is_in_range(num_cases: int) -> None:
    @settings(max_examples=num_cases, deadline=None, derandomize=True)
    @given(
        parts=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=20),
        reference=st.sampled_from([ONE, TWO, SPEAK]),
    )
    def check(parts: list[str], reference: str) -> None:
        strict = RewardConfig(opaque_thought=True, strict_format=True, granularity="whole_calls")
        for config in (RewardConfig(), strict):
            reward = tool_call_reward("".join(parts), reference, step=20, config=config)
            ranges = reward_ranges(20, config)
            assert 0 <= reward.accuracy <= 1
            assert reward.format in (ranges.format_pass, ranges.format_fail)
            assert ranges.correctness_min <= reward.correctness <= ranges.correctness_max
            assert reward.total == reward.format + reward.correctness

    check()


def test_thought_text_is_free() -> None:
    assert THOUGHT.startswith("<think>")
    assert tool_call_reward(ONE.replace("q", "日本 ❄ \\u0000"), ONE, step=0).total == 4
