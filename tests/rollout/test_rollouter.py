"""The loop over episodes with a scripted sampler in the place of the engine (the real one: test_multi_turn.py).

1. one turn without an environment, several with one; masks, seeds and ids as promised
2. every way a rollout ends, as data; a slow or broken environment ends its own rollout only
3. an instance of an environment serves one rollout and is closed
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from megatron_rest.regions import Schemas
from megatron_rest.rollout.engine import Cut, make_requests, part_seed, turn_seed
from megatron_rest.rollout.environments.base import Answer, Message, Observation
from megatron_rest.rollout.environments.calls import ParsedCalls, parse_calls
from megatron_rest.rollout.rollouter import Conversation, Turn, run_rollouts
from megatron_rest.types import PromptSample, Rollout, StopReason

CONTEXT, LIMIT = 100, 40
SLOW = 4.0  # seconds of a step that is too slow
END = 0  # the scripted sampler's stop token


class ScriptedSampler:
    """Answers from a script: ``answers[prompt][turn]`` tokens, then END unless the limit comes first."""

    policy_version = 7

    def __init__(self, answers: dict[int, list[int]]) -> None:
        self.answers = answers
        self.running: dict[int, Turn] = {}
        self.turns: dict[int, int] = {}
        self.seen: list[tuple[int, list[int], int, int]] = []

    def submit(self, key: int, token_ids: Sequence[int], *, seed: int, max_tokens: int) -> None:
        turn = self.turns[key] = self.turns.get(key, -1) + 1
        self.seen.append((key, list(token_ids), seed, max_tokens))
        length = self.answers[key][turn]
        ids = [*range(10, 10 + length), END][:max_tokens]
        finish = "stop" if ids[-1] == END else "length"
        log_probs = -np.arange(1, len(ids) + 1, dtype=np.float32)
        self.running[key] = Turn(key, np.array(ids, np.int32), log_probs, finish)

    def step(self) -> list[Turn]:
        key = next(iter(self.running))
        return [self.running.pop(key)]

    def cut(self) -> list[Turn]:
        """Two tokens of each; one of no length has none yet."""
        turns = [replace(t, token_ids=t.token_ids[:2], log_probs=t.log_probs[:2]) for t in self.running.values()]
        self.running.clear()
        return [turn for turn in turns if self.answers[turn.key][self.turns[turn.key]]]

    def room(self, num_tokens: int) -> int:
        return CONTEXT - num_tokens


class Translator:
    """A token a letter; three tokens for every message."""

    def text(self, token_ids: np.ndarray) -> str:
        return "".join(chr(97 + i) for i in token_ids if i != END)

    def calls(self, text: str, schemas: Schemas) -> ParsedCalls:
        return parse_calls('<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2)

    def render(self, messages: Sequence[Message]) -> np.ndarray:
        return np.full(3 * len(messages), 90, np.int32)


class ScriptedEnvironment:
    """``script``: what each step does: "go", "done", "slow", "raise"."""

    made: ClassVar[list[ScriptedEnvironment]] = []

    def __init__(self, script: Sequence[str]) -> None:
        self.script = list(script)
        self.answers: list[Answer] = []
        self.num_resets = 0
        self.closed = threading.Event()
        ScriptedEnvironment.made.append(self)

    def reset(self) -> None:
        self.num_resets += 1

    def step(self, answer: Answer) -> Observation:
        self.answers.append(answer)
        match self.script[answer.turn]:
            case "done" | "nan" | "numpy" | "text" | "no reward":
                return Observation(done=True)
            case "slow":
                time.sleep(SLOW)
            case "raise":
                raise OSError("the disk is gone")
        return Observation(messages=(Message(role="tool", content="x"),) * 2)

    def reward(self) -> float | None:
        given: dict[str, Any] = {"nan": math.nan, "numpy": np.float32(0.5), "text": "a lot", "no reward": None}
        return given.get(self.script[-1], float(len(self.answers)))

    def close(self) -> None:
        self.closed.set()


class AsynchronousEnvironment(ScriptedEnvironment):
    """The same with coroutines, and a lock that belongs to the event loop of the call that made it."""

    async def reset(self) -> None:  # type: ignore[override]
        super().reset()
        self.lock = asyncio.Lock()

    async def step(self, answer: Answer) -> Observation:  # type: ignore[override]
        async with self.lock:
            await asyncio.sleep(0)
            return super().step(answer)

    async def reward(self) -> float | None:  # type: ignore[override]
        return super().reward()

    async def close(self) -> None:  # type: ignore[override]
        super().close()


def prompt(index: int, length: int = 5) -> PromptSample:
    return PromptSample(
        prompt_id=f"p{index}", token_ids=np.arange(length, dtype=np.int32), ground_truth="", index=index
    )


def play(answers: list[list[int]], scripts: list[Sequence[str]] | None, **settings: Any) -> tuple[list[Rollout], Any]:
    ScriptedEnvironment.made = []
    sampler = ScriptedSampler(dict(enumerate(answers)))
    conversation = None
    if scripts is not None:
        conversation = Conversation(
            factory=lambda p: settings.get("environment", ScriptedEnvironment)(scripts[p.index]),
            translator=Translator(),
            max_turns=settings.pop("max_turns", 4),
            timeout_seconds=settings.pop("timeout_seconds", 30.0),
        )
    length = settings.pop("prompt_length", 5)
    requests = make_requests([prompt(i, length) for i in range(len(answers))], rollouts_per_prompt=1, seed=3)
    done: dict[int, Rollout] = {}
    beats: list[int] = []

    def take(key: int, rollout: Rollout) -> None:
        assert key not in done, "handed over twice"
        done[key] = rollout

    run_rollouts(
        sampler,
        requests,
        max_response_tokens=LIMIT,
        on_rollout=take,
        conversation=conversation,
        beat=lambda: beats.append(1),
    )
    assert beats and not sampler.running
    return [done[i] for i in range(len(answers))], sampler


def test_without_an_environment_a_rollout_is_one_turn() -> None:
    (first, second), sampler = play([[3], [60]], None)
    assert first.stop_reason is StopReason.EOS and first.token_ids.tolist() == [10, 11, 12, END]
    assert second.stop_reason is StopReason.LENGTH and len(second.token_ids) == LIMIT
    assert first.loss_mask.all() and first.reward is None and first.policy_version == 7
    requests = make_requests([prompt(0), prompt(1)], rollouts_per_prompt=1, seed=3)
    assert [seed for _, _, seed, _ in sampler.seen] == [r.seed for r in requests]
    [long], _ = play([[60]], None, prompt_length=CONTEXT - 8)
    assert long.stop_reason is StopReason.CONTEXT and len(long.token_ids) == 8


def test_turns_are_appended_and_masked() -> None:
    (rollout, other), sampler = play([[3, 2, 1], [1]], [["go", "go", "done"], ["done"]])
    turns = [[10, 11, 12, END], [10, 11, END], [10, END]]
    said = [90] * 6  # two messages of three tokens
    assert rollout.token_ids.tolist() == [*turns[0], *said, *turns[1], *said, *turns[2]]
    wanted = [True] * 4 + [False] * 6 + [True] * 3 + [False] * 6 + [True] * 2
    assert rollout.loss_mask.tolist() == wanted
    assert (rollout.log_probs[~rollout.loss_mask] == 0).all() and (rollout.log_probs[rollout.loss_mask] < 0).all()
    assert (rollout.stop_reason, rollout.reward) == (StopReason.EOS, 3.0)
    assert (other.stop_reason, other.reward) == (StopReason.EOS, 1.0)
    mine = [(ids, seed) for key, ids, seed, _ in sampler.seen if key == 0]
    head = list(range(5))
    assert [ids for ids, _ in mine] == [head, [*head, *turns[0], *said], [*head, *turns[0], *said, *turns[1], *said]]
    base = mine[0][1]
    assert [seed for _, seed in mine] == [turn_seed(base, t) for t in range(3)] and len({s for _, s in mine}) == 3
    [first] = [e for e in ScriptedEnvironment.made if len(e.answers) == 3]
    assert [a.turn for a in first.answers] == [0, 1, 2] and first.answers[0].text == "klm"
    assert len(first.answers[0].calls.calls) == 2, "several calls in one answer"
    assert len(ScriptedEnvironment.made) == 2 and all(e.num_resets == 1 for e in ScriptedEnvironment.made)
    assert all(e.closed.wait(60) for e in ScriptedEnvironment.made)


@pytest.mark.parametrize(
    ("answers", "script", "reason", "reward"),
    [
        ([1, 1, 1, 1, 1], ["go"] * 5, StopReason.TURNS, 4.0),
        ([60], ["done"], StopReason.LENGTH, 0.0),  # cut off: the environment never saw it
        ([33, 1], ["go", "done"], StopReason.LENGTH, 1.0),  # six tokens of tool output do not fit
        ([30, 60], ["go", "done"], StopReason.LENGTH, 1.0),
        ([1, 1], ["raise", "done"], StopReason.TOOL_FAILED, 0.0),
        ([1, 1], ["slow", "done"], StopReason.TOOL_TIMEOUT, 0.0),
    ],
)
def test_ends_are_data_and_stay_in_their_rollout(
    answers: list[int], script: list[str], reason: StopReason, reward: float
) -> None:
    limit = SLOW / 2 if "slow" in script else 600.0  # a busy machine must not be too slow for the neighbour
    (rollout, neighbour), _ = play([answers, [1, 1]], [script, ["go", "done"]], timeout_seconds=limit)
    assert (rollout.stop_reason, rollout.reward) == (reason, reward)
    assert len(rollout.token_ids) <= LIMIT and rollout.loss_mask[-1], "no tool output at the end"
    assert (neighbour.stop_reason, neighbour.reward) == (StopReason.EOS, 2.0)


def test_context_that_is_full_ends_a_conversation() -> None:
    [rollout], _ = play([[1, 1]], [["go", "done"]], prompt_length=CONTEXT - 8)
    assert rollout.stop_reason is StopReason.CONTEXT and len(rollout.token_ids) == 2


@pytest.mark.parametrize(
    ("given", "reason", "reward"),
    [
        ("numpy", StopReason.EOS, 0.5),
        ("no reward", StopReason.EOS, None),
        ("nan", StopReason.TOOL_FAILED, 0.0),
        ("text", StopReason.TOOL_FAILED, 0.0),
    ],
)
def test_a_reward_is_a_finite_number_or_ends_its_rollout(given: str, reason: StopReason, reward: float | None) -> None:
    (rollout, neighbour), _ = play([[1, 1], [1, 1]], [["go", given], ["go", "done"]])
    assert (rollout.stop_reason, rollout.reward) == (reason, reward)
    assert rollout.reward is None or type(rollout.reward) is float
    assert (neighbour.stop_reason, neighbour.reward) == (StopReason.EOS, 2.0)


def test_asynchronous_environments_are_awaited_on_one_event_loop() -> None:
    answers, scripts = [[3, 2, 1], [1, 1], [1]], [["go", "go", "done"], ["go", "raise"], ["nan"]]
    calm, _ = play(answers, scripts)
    awaited, _ = play(answers, scripts, environment=AsynchronousEnvironment)
    for a, b in zip(calm, awaited, strict=True):
        assert (a.token_ids.tolist(), a.stop_reason, a.reward) == (b.token_ids.tolist(), b.stop_reason, b.reward)
    assert [r.stop_reason for r in awaited] == [StopReason.EOS, StopReason.TOOL_FAILED, StopReason.TOOL_FAILED]
    assert all(e.closed.wait(60) and type(e) is AsynchronousEnvironment for e in ScriptedEnvironment.made)


def test_requests_may_come_while_others_run() -> None:
    sampler = ScriptedSampler({key: [2] for key in range(6)})
    requests = make_requests([prompt(i) for i in range(6)], rollouts_per_prompt=1, seed=3)
    done: dict[int, Rollout] = {}
    batches: list[Any] = [[], requests[1:3], [], [], requests[3:], None]
    run_rollouts(
        sampler,
        requests[:1],
        max_response_tokens=LIMIT,
        on_rollout=done.__setitem__,
        more=lambda: batches.pop(0),
    )
    assert sorted(done) == list(range(6)) and batches == []
    run_rollouts(sampler, [], max_response_tokens=LIMIT, on_rollout=done.__setitem__, more=lambda: None)


def test_a_cut_rollout_goes_on_from_where_it_was() -> None:
    sampler = ScriptedSampler({0: [3, 4], 1: [5, 6], 2: [0, 1], 3: [60, 60]})
    requests = make_requests([prompt(i) for i in range(4)], rollouts_per_prompt=1, seed=3)
    done: dict[int, Rollout] = {}
    answers = iter([(), Cut.NOW])
    run_rollouts(sampler, requests, max_response_tokens=LIMIT, on_rollout=done.__setitem__, more=lambda: next(answers))
    assert {key: rollout.stop_reason for key, rollout in done.items()} == {
        0: StopReason.EOS, 1: StopReason.CUT, 3: StopReason.CUT,
    }, "what has no token is not handed over"  # fmt: skip
    assert done[1].token_ids.tolist() == [10, 11] and done[1].versions.tolist() == [7, 7]
    sampler.policy_version, sampler.seen = 8, []
    again = [replace(requests[key], begun=done.get(key)) for key in (1, 2, 3)]
    run_rollouts(sampler, again, max_response_tokens=LIMIT, on_rollout=done.__setitem__)
    assert done[1].token_ids.tolist() == [10, 11, 10, 11, 12, 13, 14, 15, END]
    assert done[1].versions.tolist() == [7] * 2 + [8] * 7 and done[1].policy_version == 8
    assert done[1].log_probs.tolist() == [-1, -2, -1, -2, -3, -4, -5, -6, -7] and done[1].loss_mask.all()
    assert done[1].oldest_version == 7 and done[2].oldest_version == 8
    assert done[3].stop_reason is StopReason.LENGTH and len(done[3].token_ids) == LIMIT, "tokens before the cut count"
    by_key = {key: (ids, seed, most) for key, ids, seed, most in sampler.seen}
    assert by_key[1] == ([*range(5), 10, 11], part_seed(requests[1].seed, 2), LIMIT - 2)
    assert by_key[2] == (list(range(5)), requests[2].seed, LIMIT), "as if it had never been asked for"
