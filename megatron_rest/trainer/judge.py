"""Rollouts -> regions, rewards, advantages: everything that looks at what was sampled.

Regions are computed on the bytes of the sampled tokens; the response text exists for the reward only and is never
tokenised again.  Single rollouts are read by one rank each (``reading.py``); what compares them, every rank computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from megatron_rest.algorithms import JudgedRollouts, find_estimator
from megatron_rest.config import AdvantageConfig, RewardConfig
from megatron_rest.regions import (
    TOOLRL,
    Dialect,
    answer_prefix,
    is_thought_open,
    label_rollout,
    read_turn,
    schemas_of,
    turn_starts,
)
from megatron_rest.rewards import ReferenceAnswerError, tool_call_reward
from megatron_rest.rewards.functions import Reward, RewardInput, RewardTurn
from megatron_rest.trainer.reading import Reading, read_together
from megatron_rest.trainer.rewarding import RewardTerms, token_rewards
from megatron_rest.trainer.rollout_sample import RolloutSample
from megatron_rest.trainer.time_limit import time_limit
from megatron_rest.types import PromptSample, RewardOutput, Rollout, RolloutGroup, StopReason, TrainSample, TurnMark

__all__ = ["Judge", "Verdict"]

PartsOf = Mapping[str, np.ndarray]

_log = logging.getLogger(__name__)
_TAIL = 32  # last tokens of a prompt: more than an opened or an empty thought takes
_ROUNDING = 1e-12  # of a reward's parts against its total
_SHOWN = 500  # characters of an answer that could not be judged


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """All rollouts of a step, judged; lists are in rollout order."""

    samples: tuple[TrainSample, ...]
    rewards: tuple[RewardOutput, ...]
    static_rewards: tuple[float, ...]  # total without the schedule: comparable between steps
    is_zero_group: tuple[bool, ...]  # a group each: whether its advantages are all zero, so that it teaches nothing
    num_truncated: int  # rollouts that hit the length limit
    # False: infrastructure ended the rollout, or its reward failed: neither says anything of the policy
    is_judged: tuple[bool, ...]
    scored_rewards: tuple[float, ...] = ()  # what advantages come from: totals, less what overlong answers lose

    def __post_init__(self) -> None:
        if not self.scored_rewards:
            object.__setattr__(self, "scored_rewards", tuple(reward.total for reward in self.rewards))


class Judge:
    """Turns the groups of a step into train samples.  A call is collective: all ranks, the same groups.

    Args:
        token_bytes: bytes of every vocabulary id.
        reward: reward with its schedule.
        advantage: from rewards to advantages.
        dialect: how the policy writes: for regions and rewards.
        stop_token_ids: a sampled one ended its turn; it is glue, and no part of the answer's text.
        max_response_tokens: where answers are cut; what ``advantage.overlong_buffer`` counts from.
        marks_turns: whether samples say which of their turns are wrong in form, for token credit that asks.

    Whether a prompt has opened the thought (or closed an empty one) is read from its last tokens, turn by turn.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        reward: RewardConfig,
        advantage: AdvantageConfig,
        dialect: Dialect = TOOLRL,
        stop_token_ids: Sequence[int] = (),
        max_response_tokens: int = 0,
        marks_turns: bool = False,
    ) -> None:
        self.token_bytes = token_bytes
        self.reward = reward
        self.static_reward = replace(reward, schedule=False)
        self.advantage = advantage
        self.estimate = find_estimator(advantage)
        self.max_response_tokens = max_response_tokens
        self.marks_turns = marks_turns
        self._reported: set[str] = set()  # what was said once: prompts whose references cannot be read
        # Of the step's rollouts what was read in them: a step that draws again judges some twice.
        self._read: dict[int, tuple[Rollout, Reading]] = {}
        self.dialect = dialect
        self.stop_token_ids = frozenset(stop_token_ids)
        self.terms = None if reward.is_rule_alone else RewardTerms(reward)
        self._has_rule = any(term.function == "tool_call" for term in reward.as_terms())
        # Of the step's rollouts what foreign rewards said: a step that draws again judges some twice, and asks once.
        self._said: dict[int, Sequence[Reward | str]] = {}
        self._said_in = -1
        self.waited = 0.0  # seconds of the last call in which other ranks read

    def __call__(self, groups: Sequence[RolloutGroup], *, step: int) -> Verdict:
        self._read_all(groups, step=step)
        judged = [pair for group in self._rewards(groups, step=step) for pair in group]
        rewards = [reward for reward, _ in judged]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        is_judged = np.array(
            [r.is_judged and _is_whole(rollout) for r, rollout in zip(rewards, rollouts, strict=True)], bool
        )
        overlong = np.array([self._overlong(rollout) for rollout in rollouts])
        scored = np.array([reward.total for reward in rewards]) + overlong
        numbers = np.array([number for number, group in enumerate(groups) for _ in group.rollouts], np.int64)
        advantages = self._advantages(numbers, is_judged, scored, _parts(rewards, overlong))
        samples = [
            self.sample(
                groups[numbers[i]],
                rollout,
                advantage=float(advantages[i]),
                sequence_id=i,
                group_id=int(numbers[i]),
                carries_loss=bool(is_judged[i]),
                reward=rewards[i],
            )
            for i, rollout in enumerate(rollouts)
        ]
        return Verdict(
            samples=tuple(samples),
            rewards=tuple(rewards),
            static_rewards=tuple(static for _, static in judged),
            is_zero_group=tuple((np.bincount(numbers, advantages != 0, minlength=len(groups)) == 0).tolist()),
            num_truncated=sum(rollout.stop_reason is not StopReason.EOS for rollout in rollouts),
            is_judged=tuple(is_judged.tolist()),
            scored_rewards=tuple(scored.tolist()),
        )

    def _advantages(
        self, numbers: np.ndarray, is_judged: np.ndarray, rewards: np.ndarray, parts: PartsOf
    ) -> np.ndarray:
        """float64 [S] of all rollouts, ``numbers`` their groups'.  Those that were not judged have 0 and count for
        nobody.

        One that is left of several has nobody to be compared with: 0.
        """
        left, size = np.bincount(numbers, is_judged), np.bincount(numbers)
        counted = is_judged & ((left > 1) | (left == size))[numbers]
        advantages = np.zeros(len(rewards))
        if counted.any():
            scored = JudgedRollouts(
                rewards=rewards[counted],
                groups=numbers[counted],
                parts={name: values[counted] for name, values in parts.items()},
            )
            advantages[counted] = self.estimate(scored)
        return advantages

    def _overlong(self, rollout: Rollout) -> float:
        """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13), <= 0."""
        buffer = self.advantage.overlong_buffer
        if not buffer:
            return 0.0
        over = len(rollout.token_ids) - (self.max_response_tokens - buffer)
        return -self.advantage.overlong_penalty * min(max(over / buffer, 0.0), 1.0)

    def _rewards(self, groups: Sequence[RolloutGroup], *, step: int) -> list[list[tuple[RewardOutput, float]]]:
        """Of every rollout its reward, and the total without the schedule."""
        if self.terms is None:
            return [[self._rule(rollout) for rollout in group.rollouts] for group in groups]
        new = [(r, g.prompt) for g in groups for r in g.rollouts if _is_whole(r) and id(r) not in self._said]
        said = self.terms(len(new), lambda i: self.reward_input(*new[i], step=step))
        self._said |= {id(rollout): row for (rollout, _), row in zip(new, said, strict=True)}
        return [[self._added_up(group, i) for i in range(len(group.rollouts))] for group in groups]

    def _read_all(self, groups: Sequence[RolloutGroup], *, step: int) -> None:
        """Read what is new among ``groups``, each rollout on one rank; collective."""
        if step != self._said_in:
            self._read, self._said, self._said_in = {}, {}, step
        new = [(g, i) for g in groups for i, r in enumerate(g.rollouts) if id(r) not in self._read]
        started = time.perf_counter()
        lengths = [len(group.rollouts[i].token_ids) for group, i in new]
        readings, seconds = read_together(lengths, lambda n: self._read_one(*new[n], step=step))
        self.waited = time.perf_counter() - started - seconds
        for (group, i), reading in zip(new, readings, strict=True):
            self._read[id(group.rollouts[i])] = group.rollouts[i], reading
            for notice in reading.notices:
                if group.prompt.prompt_id not in self._reported:
                    self._reported.add(group.prompt.prompt_id)
                    _log.warning("%s", notice)

    def _read_one(self, group: RolloutGroup, i: int, *, step: int) -> Reading:
        rollout, prompt = group.rollouts[i], group.prompt
        is_foreign = self.terms is not None
        rule: RewardOutput | None = None
        static, notices = 0.0, tuple[str, ...]()
        if not is_foreign or (_is_whole(rollout) and self._has_rule):
            rule, static, notices = self._judge_in_time(group, i, step=step, only_text=is_foreign)
        return Reading(
            rule=rule,
            static=static,
            regions=self._regions(prompt.token_ids, rollout),
            marks=self._marks(prompt.token_ids, rollout) if self.marks_turns else None,
            num_calls=tuple(len(turn.calls) for turn in self._turns(rollout, prompt)) if is_foreign else (),
            notices=notices,
        )

    def _rule(self, rollout: Rollout) -> tuple[RewardOutput, float]:
        """What the built-in reward said of a rollout that was read, and its total without the schedule."""
        reading = self._read[id(rollout)][1]
        assert reading.rule is not None
        return reading.rule, reading.static

    def _added_up(self, group: RolloutGroup, i: int) -> tuple[RewardOutput, float]:
        """The weighted sum of all terms; not judged if one of them is not."""
        rollout = group.rollouts[i]
        if not _is_whole(rollout):
            return _nothing(str(rollout.stop_reason))
        foreign, reading = self._said[id(rollout)], self._read[id(rollout)][1]
        total = static = 0.0
        fields: dict[str, Any] = {"detail": ()}
        parts: dict[str, float] = {}
        summands: dict[str, float] = {}
        fine: list[np.ndarray] = []
        said = iter(foreign)
        for term in self.reward.as_terms():
            name = term.name
            if term.function == "environment":
                if rollout.reward is None:
                    return _nothing(f"{name}: the environment gave no reward")
                value = static_value = rollout.reward
            elif term.function == "tool_call":
                rule, static_value = self._rule(rollout)
                value = rule.total
                fields |= {k: getattr(rule, k) for k in ("format", "correctness", "is_format_valid", "accuracy")}
                fields["detail"] += rule.detail
            else:
                reward = next(said)
                if isinstance(reward, str):
                    return _nothing(f"{name}: {reward}")
                value = static_value = reward.total
                parts |= {f"{name}/{part}": number for part, number in reward.parts.items()}
                for claim in ("accuracy", "is_format_valid"):
                    if getattr(reward, claim) is not None:
                        fields.setdefault(claim, getattr(reward, claim))
                fields["detail"] += tuple(f"{name}: {finding}" for finding in reward.findings)
                if reward.is_fine_grained:
                    earned = token_rewards(reward, rollout.loss_mask, reading.regions, reading.num_calls)
                    fine.append(term.weight * earned)
            parts[name] = value
            summands[name] = term.weight * value
            total += term.weight * value
            static += term.weight * static_value
        if fine:
            fields["token_rewards"] = np.nan_to_num(fine).sum(axis=0)
            fields["is_rewarded"] = ~np.isnan(fine).all(axis=0)
        return RewardOutput(total=total, parts=parts, summands=summands, **fields), static

    def _judge_in_time(
        self, group: RolloutGroup, i: int, *, step: int, only_text: bool = False
    ) -> tuple[RewardOutput, float, tuple[str, ...]]:
        """:meth:`judge`; what does not end within ``reward.timeout_seconds``, or fails, is named."""
        what = f"judging rollout {i} of prompt {group.prompt.prompt_id} in step {step}"
        try:
            with time_limit(self.reward.timeout_seconds, what):
                return self.judge(group.rollouts[i], group.prompt, step=step, only_text=only_text)
        except Exception as error:
            tokens = (self.token_bytes[t] for t in group.rollouts[i].token_ids)
            text = b"".join(tokens).decode("utf-8", errors="replace")
            error.add_note(f"{what}: {text[:_SHOWN]!r}{' ...' if len(text) > _SHOWN else ''}")
            raise

    def judge(
        self, rollout: Rollout, prompt: PromptSample, *, step: int, only_text: bool = False
    ) -> tuple[RewardOutput, float, tuple[str, ...]]:
        """The built-in reward of one rollout, its total without the schedule, and what people should be told: its
        environment's (unless ``only_text``), or that of its last answer.

        A reference that cannot be read earns nobody anything; it ends no run.
        """
        if rollout.reward is not None and not only_text:
            return _given(rollout.reward), rollout.reward, ()
        outside = np.flatnonzero(~rollout.loss_mask)
        start = int(outside[-1]) + 1 if len(outside) else 0
        last = rollout.token_ids[start:]
        if len(last) and int(last[-1]) in self.stop_token_ids:
            last = last[:-1]
        text = self._bytes(last).decode("utf-8", errors="replace")
        prefix = self._prefix(prompt.token_ids, rollout.token_ids[:start])
        truth = prompt.ground_truth
        judge = partial(tool_call_reward, text, truth, step=step, prefix=prefix, dialect=self.dialect)
        try:
            reward = judge(config=self.reward)
            static = judge(config=self.static_reward).total if self.reward.schedule else reward.total
            return reward, static, ()
        except ReferenceAnswerError as error:
            told = () if prompt.prompt_id in self._reported else (f"prompt {prompt.prompt_id}: {error}",)
            return _unjudged(str(error)), 0.0, tuple(f"{text}; its rollouts get reward 0" for text in told)

    def _turns(self, rollout: Rollout, prompt: PromptSample) -> list[RewardTurn]:
        """Of the policy, each with what was said to it afterwards."""
        schemas = schemas_of(prompt.tools)
        starts = turn_starts(rollout.loss_mask)
        ends = [*(start for start in starts[1:]), len(rollout.token_ids)]
        turns = []
        for start, end in zip(starts, ends, strict=True):
            mask = rollout.loss_mask[start:end]
            sampled, said = rollout.token_ids[start:end][mask], rollout.token_ids[start:end][~mask]
            if len(sampled) and int(sampled[-1]) in self.stop_token_ids:
                sampled = sampled[:-1]
            text = self._prefix(prompt.token_ids, rollout.token_ids[:start]) + self._text(sampled)
            read = read_turn(text, dialect=self.dialect, schemas=schemas)
            calls = tuple(
                {"name": call.name, "arguments": call.parameters} for call in read.calls if isinstance(call.name, str)
            )
            observation = self._text(said)
            turns.append(RewardTurn(text=text, calls=calls, call_errors=tuple(read.errors), observation=observation))
        return turns

    def reward_input(self, rollout: Rollout, prompt: PromptSample, *, step: int) -> RewardInput:
        """What a reward function is given."""
        turns = self._turns(rollout, prompt)
        return RewardInput(
            prompt_id=prompt.prompt_id,
            messages=tuple(prompt.messages),
            tools=tuple(prompt.tools),
            metadata=prompt.metadata,
            reference=prompt.ground_truth,
            text=turns[-1].text if turns else "",
            turns=tuple(turns),
            tokens=tuple(self._text(rollout.token_ids[i : i + 1]) for i in np.flatnonzero(rollout.loss_mask)),
            step=step,
            stop_reason=str(rollout.stop_reason),
            environment_reward=rollout.reward,
        )

    def _text(self, token_ids: np.ndarray) -> str:
        return self._bytes(token_ids).decode("utf-8", errors="replace")

    def _prefix(self, *before: np.ndarray) -> str:
        """What the tokens before an answer have written of it."""
        tail = np.concatenate(before)[-_TAIL:]
        return answer_prefix(self._bytes(tail), self.dialect)

    def _bytes(self, token_ids: np.ndarray) -> bytes:
        return b"".join(self.token_bytes[i] for i in token_ids)

    def _regions(self, prompt: np.ndarray, rollout: Rollout) -> np.ndarray:
        """int8 [n]: every turn labelled by what its own prompt has opened."""
        starts = turn_starts(rollout.loss_mask)
        opened = [is_thought_open(self._prefix(prompt, rollout.token_ids[:start]), self.dialect) for start in starts]
        tokens = [self.token_bytes[i] for i in rollout.token_ids]
        regions = label_rollout(tokens, rollout.loss_mask, starts_in_think=opened, dialect=self.dialect)
        ends = rollout.loss_mask & np.isin(rollout.token_ids, list(self.stop_token_ids))
        regions[ends] = self.dialect.glue
        return regions

    def _marks(self, prompt: np.ndarray, rollout: Rollout) -> np.ndarray:
        """uint8 [n]: what is wrong in form with each turn, on all its tokens."""
        marks = np.zeros(len(rollout.token_ids), np.uint8)
        for start in turn_starts(rollout.loss_mask):
            outside = np.flatnonzero(~rollout.loss_mask[start:])
            end = start + int(outside[0]) if len(outside) else len(marks)
            text = self._bytes(rollout.token_ids[start:end]).decode("utf-8", errors="replace")
            turn = read_turn(self._prefix(prompt, rollout.token_ids[:start]) + text, dialect=self.dialect)
            mark = TurnMark(0)
            if turn.errors or not turn.is_closed:
                mark |= TurnMark.CALLS
            if turn.thought is not None and not turn.is_thought_closed:
                mark |= TurnMark.THOUGHT
            marks[start:end] = mark
        return marks

    def sample(
        self,
        group: RolloutGroup,
        rollout: Rollout,
        *,
        advantage: float,
        sequence_id: int,
        group_id: int = -1,
        carries_loss: bool = True,
        reward: RewardOutput | None = None,
    ) -> TrainSample:
        """Prompt + response with regions; prompt tokens and tool outputs are CONTEXT and carry no loss.

        Its arrays are put together when somebody looks at them: a rank deals with all samples and trains on a few.

        Nor does what was not judged, or what infrastructure ended: what it did to the answer is not the policy's; nor,
        with ``advantage.mask_truncated``, what was cut at the length limit.
        """
        prompt = group.prompt.token_ids
        _, reading = self._read.get(id(rollout), (rollout, None))
        regions = self._regions(prompt, rollout) if reading is None else reading.regions
        is_cut = rollout.stop_reason in (StopReason.LENGTH, StopReason.CONTEXT)
        carries_loss &= not (rollout.stop_reason.is_infrastructure or (is_cut and self.advantage.mask_truncated))
        marks = None
        if self.marks_turns:
            marks = self._marks(prompt, rollout) if reading is None else reading.marks
        earned = None
        if reward is not None and reward.token_rewards is not None:
            is_said = rollout.loss_mask if reward.is_rewarded is None else reward.is_rewarded
            earned = np.where(is_said, reward.token_rewards, np.nan)
        return RolloutSample(
            prompt,
            rollout,
            regions=regions,
            advantage=advantage,
            sequence_id=sequence_id,
            group_id=group_id,
            carries_loss=carries_loss,
            marks=marks,
            earned=earned,
        )


def _parts(rewards: Sequence[RewardOutput], overlong: np.ndarray) -> PartsOf:
    """What the rewards add up from: float64 [S] each; what no name is for is "other"."""
    named = [reward.added_up_from() for reward in rewards]
    names = dict.fromkeys(name for summands in named for name in summands)
    parts = {name: np.array([summands.get(name, 0.0) for summands in named], np.float64) for name in names}
    other = np.array([r.total for r in rewards]) - sum(parts.values())
    other[np.abs(other) < _ROUNDING] = 0.0
    return parts | {name: values for name, values in (("overlong", overlong), ("other", other)) if values.any()}


def _is_whole(rollout: Rollout) -> bool:
    """Whether there is anything to judge."""
    return not rollout.stop_reason.is_infrastructure


def _nothing(why: str) -> tuple[RewardOutput, float]:
    return RewardOutput(total=0.0, is_judged=False, detail=(why,)), 0.0


def _unjudged(why: str) -> RewardOutput:
    return RewardOutput(total=0.0, format=0.0, correctness=0.0, is_format_valid=False, accuracy=0.0, detail=(why,))


def _given(reward: float) -> RewardOutput:
    """An environment's: it says nothing of a format or an accuracy, and nothing is claimed."""
    said = {"environment": reward}
    return RewardOutput(total=reward, parts=said, summands=said, detail=("judged by its environment",))
