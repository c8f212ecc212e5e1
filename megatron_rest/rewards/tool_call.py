"""The rule reward: format + correctness, each in a range that the schedule moves.

    total = (format_pass or format_fail) + (max - min) * S_acc + min            (+ the optional length bonus)

Kept from the published reward on purpose, because its numbers are what the paper trained with: a reference without
tool calls gives correctness 0 whatever the answer calls, and any unreadable line of JSON gives the minimum for the
whole block.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rest.config import RewardConfig
from megatron_rest.rewards.answer_format import format_findings
from megatron_rest.rewards.findings import Finding
from megatron_rest.rewards.matching import match_calls
from megatron_rest.rewards.parsing import ToolCallError, answer_text, parse_tool_calls, thought_end
from megatron_rest.rewards.schedule import reward_ranges
from megatron_rest.types import RewardOutput, TokenRegion

__all__ = ["Judgement", "judge_answer", "tool_call_reward"]

_LENGTH_WORDS = 512  # words of thought that earn the whole length bonus
_LENGTH_FROM, _LENGTH_TO, _LENGTH_STEPS = 384, 640, 105  # the same under length_schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What an answer is, before any schedule turns it into numbers."""

    is_format_valid: bool
    accuracy: float  # S_acc in [0, 1]; without calls in the reference: 1 if the answer makes none either, else 0
    wants_calls: bool  # the reference has a tool_call block: correctness counts
    findings: tuple[Finding, ...]


def tool_call_reward(
    response_text: str,
    ground_truth: str,
    *,
    step: int,
    config: RewardConfig | None = None,
    starts_in_think: bool = False,
) -> RewardOutput:
    """Reward of one answer.

    Args:
        response_text: what the policy wrote, decoded.  It may end in an end-of-turn marker: everything from the first
            ``<|im_end|>``, ``<|endoftext|>``, ``<|eot_id|>``, ``<|eom_id|>`` or ``<|end_of_text|>`` on is cut, then
            white space is stripped.
        ground_truth: the reference answer; its tags say which sections are wanted.
        step: training step, 1 at the first (0 is allowed): drives the schedule.
        config: ranges, schedule and rules; None = defaults.
        starts_in_think: the prompt already ends in ``<think>``, so the answer is judged as if it started with it.

    Returns:
        The total and its parts; ``accuracy`` does not depend on the schedule; ``detail`` has one line a finding.

    Raises:
        ValueError: the *reference* cannot be parsed, or step < 0.  No answer ever raises.
    """
    config = config if config is not None else RewardConfig()
    ranges = reward_ranges(step, config)
    text = answer_text("<think>" + response_text if starts_in_think else response_text)
    judgement = judge_answer(text, ground_truth, config=config)
    format_part = ranges.format_pass if judgement.is_format_valid else ranges.format_fail
    correctness = 0.0
    if judgement.wants_calls:
        span = ranges.correctness_max - ranges.correctness_min
        correctness = span * judgement.accuracy + ranges.correctness_min
    bonus = _length_bonus(text, step, config) if config.length_bonus else 0.0
    return RewardOutput(
        total=format_part + correctness + bonus,
        format=format_part,
        correctness=correctness,
        is_format_valid=judgement.is_format_valid,
        accuracy=judgement.accuracy,
        detail=tuple(str(finding) for finding in judgement.findings),
    )


def judge_answer(text: str, ground_truth: str, *, config: RewardConfig) -> Judgement:
    """Format and accuracy of an answer without its end-of-turn marker; findings point at regions and calls."""
    start = thought_end(text) if config.opaque_thought else 0
    findings = format_findings(text, ground_truth, strict=config.strict_format, thought_end=start)
    is_format_valid = not findings
    wants_calls = "<tool_call>" in ground_truth
    if wants_calls:
        accuracy, wrong = _call_accuracy(text, ground_truth, config)
        findings = findings + wrong
    else:
        calls_anyway = "<tool_call>" in text[start:]
        accuracy = float(not calls_anyway)
        if calls_anyway:  # seen, but not punished: the published correctness is 0 here whatever the answer does
            message = "a tool call where the reference makes none"
            findings = [*findings, Finding(region=TokenRegion.TOOL_NAME, message=message)]
    return Judgement(
        is_format_valid=is_format_valid, accuracy=accuracy, wants_calls=wants_calls, findings=tuple(findings)
    )


def _call_accuracy(text: str, ground_truth: str, config: RewardConfig) -> tuple[float, list[Finding]]:
    try:
        reference = parse_tool_calls(ground_truth, accept_arguments=True, opaque_thought=True)
    except ToolCallError as error:
        raise ValueError(f"the reference answer cannot be parsed: {error}") from error
    try:
        predicted = parse_tool_calls(
            text, accept_arguments=config.accept_arguments, opaque_thought=config.opaque_thought
        )
    except ToolCallError as error:
        return 0.0, [Finding(region=TokenRegion.FORMAT, message=str(error))]
    return match_calls(reference, predicted, granularity=config.granularity)


def _length_bonus(text: str, step: int, config: RewardConfig) -> float:
    """Words in the last thought over the wanted number, rounded to 2 decimals, at most 1; 0 without a thought."""
    if "<think>" not in text or "</think>" not in text:
        return 0.0
    words = len(text.split("<think>")[-1].split("</think>")[0].split())
    wanted: float = _LENGTH_WORDS
    if config.length_schedule:
        wanted = _LENGTH_FROM + (_LENGTH_TO - _LENGTH_FROM) * step / _LENGTH_STEPS
    return min(1.0, round(words / wanted, 2))
