"""The rule reward: format + correctness, each in a range that the schedule moves.

    total = (format_pass or format_fail) + (max - min) * S_acc + min            (+ the optional length bonus)

Kept from the published reward on purpose, because its numbers are what the paper trained with: a reference without
tool calls gives correctness 0 whatever the answer calls, and any unreadable line of JSON gives the minimum for the
whole block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_rest.config import RewardConfig
from megatron_rest.regions import TOOLRL, TOOLRL_TAGS_ONLY, Dialect, ToolCall, read_turn
from megatron_rest.reward_output import RewardOutput
from megatron_rest.rewards.answer_format import format_findings, turn_findings
from megatron_rest.rewards.findings import Finding
from megatron_rest.rewards.matching import match_calls
from megatron_rest.rewards.parsing import (
    ReferenceAnswerError,
    ToolCallError,
    answer_text,
    parse_tool_calls,
    read_reference,
    thought_end,
)
from megatron_rest.rewards.schedule import reward_ranges
from megatron_rest.token_region import TokenRegion

__all__ = ["Judgement", "judge_answer", "tool_call_reward", "why_not_earnable"]

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
    prefix: str = "",
    dialect: Dialect = TOOLRL,
) -> RewardOutput:
    """Reward of one answer.

    Args:
        response_text: what the policy wrote, decoded.  It may end in an end-of-turn marker: everything from the first
            one of common families (and of the dialect) on is cut, then white space is stripped.
        ground_truth: the reference answer in ToolRL's tags, whatever the dialect; they say which sections are wanted.
        step: training step, 1 at the first (0 is allowed): drives the schedule.
        config: ranges, schedule and rules; None = defaults.
        starts_in_think: the prompt already ends in ``<think>``, so the answer is judged as if it started with it.
        prefix: what the prompt has written of the answer (``regions.answer_prefix``); says the same in full.
        dialect: how the policy writes.

    Returns:
        The total and its parts; ``accuracy`` does not depend on the schedule; ``detail`` has one line a finding.

    Raises:
        ValueError: the *reference* cannot be parsed (ReferenceAnswerError), or step < 0.  No answer ever raises.
    """
    config = config if config is not None else RewardConfig()
    ranges = reward_ranges(step, config)
    if starts_in_think and not prefix and dialect.thought is not None:
        prefix = dialect.thought.open.decode()
    text = answer_text(prefix + response_text)
    judgement = judge_answer(text, ground_truth, config=config, dialect=dialect)
    format_part = ranges.format_pass if judgement.is_format_valid else ranges.format_fail
    correctness = 0.0
    if judgement.wants_calls:
        span = ranges.correctness_max - ranges.correctness_min
        correctness = span * judgement.accuracy + ranges.correctness_min
    bonus = _length_bonus(text, step, config, dialect) if config.length_bonus else 0.0
    return RewardOutput(
        total=format_part + correctness + bonus,
        format=format_part,
        correctness=correctness,
        is_format_valid=judgement.is_format_valid,
        accuracy=judgement.accuracy,
        detail=tuple(str(finding) for finding in judgement.findings),
    )


def judge_answer(text: str, ground_truth: str, *, config: RewardConfig, dialect: Dialect = TOOLRL) -> Judgement:
    """Format and accuracy of an answer without its end-of-turn marker; findings point at regions and calls."""
    reference = read_reference(ground_truth)
    if dialect.name in _TAGGED:
        return _judge_tagged(text, ground_truth, config)
    turn = read_turn(text, dialect=dialect)
    findings = turn_findings(turn, reference, dialect)
    is_format_valid = not findings
    if not reference.wants_calls:
        accuracy = float(not turn.has_calls)
    elif turn.errors or not turn.is_closed:
        accuracy = 0.0
    else:
        wanted = _as_written(ground_truth, dialect)
        accuracy, wrong = match_calls(wanted, turn.calls, granularity=config.granularity)
        findings += wrong
    return Judgement(
        is_format_valid=is_format_valid,
        accuracy=accuracy,
        wants_calls=reference.wants_calls,
        findings=tuple(findings),
    )


_TAGGED = (TOOLRL.name, TOOLRL_TAGS_ONLY.name)  # answers for the user have tags, and the published rules are for them


def why_not_earnable(answer: str, ground_truth: str, *, config: RewardConfig, dialect: Dialect = TOOLRL) -> str:
    """Why the reference itself, written as ``answer``, does not earn full marks; empty where it does."""
    try:
        judgement = judge_answer(answer_text(answer), ground_truth, config=config, dialect=dialect)
    except ReferenceAnswerError as error:
        return str(error)
    if judgement.is_format_valid and (not judgement.wants_calls or judgement.accuracy >= 1.0):
        return ""
    why = "; ".join(map(str, judgement.findings[:2])) or f"its accuracy is {judgement.accuracy:.2f}"
    return f"the reference answer does not earn its own reward: {why}"


@lru_cache(maxsize=4096)
def _as_written(ground_truth: str, dialect: Dialect) -> tuple[ToolCall, ...]:
    """The reference's calls as the dialect can say them: one that writes no types cannot tell "3" from 3."""
    calls = read_reference(ground_truth).calls
    if dialect.types_are_written:
        return calls
    try:
        return read_turn(dialect.write([(call.name, call.parameters) for call in calls]), dialect=dialect).calls
    except ToolCallError as error:
        raise ReferenceAnswerError(f"the reference answer cannot be written in {dialect.name}: {error}") from error


def _judge_tagged(text: str, ground_truth: str, config: RewardConfig) -> Judgement:
    """ToolRL's tags, by the published rules but for what ``config`` lifts."""
    start = thought_end(text) if config.opaque_thought else 0
    reference = read_reference(ground_truth)
    findings = format_findings(
        text,
        reference.sections,
        strict=config.strict_format,
        thought_end=start,
        several_blocks=config.accept_arguments,
    )
    is_format_valid = not findings
    if reference.wants_calls:
        accuracy, wrong = _call_accuracy(text, reference.calls, config)
        findings = findings + wrong
    else:
        calls_anyway = "<tool_call>" in text[start:]
        accuracy = float(not calls_anyway)
        if calls_anyway:  # seen, but not punished: the published correctness is 0 here whatever the answer does
            message = "a tool call where the reference makes none"
            findings = [*findings, Finding(region=TokenRegion.TOOL_NAME, message=message)]
    return Judgement(
        is_format_valid=is_format_valid, accuracy=accuracy, wants_calls=reference.wants_calls, findings=tuple(findings)
    )


def _call_accuracy(text: str, reference: tuple[ToolCall, ...], config: RewardConfig) -> tuple[float, list[Finding]]:
    try:
        predicted = parse_tool_calls(
            text, accept_arguments=config.accept_arguments, opaque_thought=config.opaque_thought
        )
    except ToolCallError as error:
        return 0.0, [Finding(region=TokenRegion.FORMAT, message=str(error))]
    return match_calls(reference, predicted, granularity=config.granularity)


def _length_bonus(text: str, step: int, config: RewardConfig, dialect: Dialect) -> float:
    """Words in the last thought over the wanted number, rounded to 2 decimals, at most 1; 0 without a thought."""
    if dialect.thought is None or dialect.thought.close is None:
        return 0.0
    opening, closing = dialect.thought.open.decode(), dialect.thought.close.decode()
    if opening not in text or closing not in text:
        return 0.0
    words = len(text.split(opening)[-1].split(closing)[0].split())
    wanted: float = _LENGTH_WORDS
    if config.length_schedule:
        wanted = _LENGTH_FROM + (_LENGTH_TO - _LENGTH_FROM) * step / _LENGTH_STEPS
    return min(1.0, round(words / wanted, 2))
