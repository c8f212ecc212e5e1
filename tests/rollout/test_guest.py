"""What foreign environments return: safe, or the end of that rollout and of no other.

Thousands of guests return whatever their kind can: None, numbers of numpy, bytes, half characters, megabytes, objects
that cannot be printed.  Every rollout ends once, with a reason; texts are bounded; every environment is closed.
"""

from __future__ import annotations

import math
import random
import threading
from typing import Any

import numpy as np
import pytest

from megatron_rest.rollout.engine import make_requests
from megatron_rest.rollout.environments.base import Answer, Message, Observation
from megatron_rest.rollout.environments.guest import MAX_CHARACTERS, checked_observation, checked_reward
from megatron_rest.rollout.rollouter import Conversation, run_rollouts
from megatron_rest.types import Rollout, StopReason
from tests.rollout.test_rollouter import ScriptedSampler, Translator, prompt


class Unprintable:
    """A tool's own object."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


def message(content: Any, role: Any = "tool") -> Observation:
    return Observation(messages=(Message(role=role, content=content),))


GOOD: tuple[Any, ...] = (
    message("fine"), message("", "user"), message("\ud83d half a character"), message("x" * (MAX_CHARACTERS + 9)),
    message("nul \0 and <|im_end|>"), Observation(messages=[Message(role="tool", content="a list")]),  # type: ignore[arg-type]
)  # fmt: skip
BAD: tuple[Any, ...] = (
    None, 7, b"bytes", "text", np.float32(1), {"content": "x"}, Unprintable(), message(None), message(3), message(b"x"),
    message(Unprintable()), message("x", "system"), message("x", None), Observation(messages=("text",)),  # type: ignore[arg-type]
    Observation(messages="text"), Observation(messages=(None,)),  # type: ignore[arg-type]
)  # fmt: skip
REWARDS: tuple[tuple[Any, bool], ...] = (
    (1, True), (0.5, True), (None, True), (np.float32(0.25), True), (np.int64(-3), True), (True, True),
    (np.array(2.0), True), (math.nan, False), (-math.inf, False), (np.float64("nan"), False), ("1", False),
    ([1.0], False), (10**400, False), (np.array([1.0, 2.0]), False), (Unprintable(), False), (1j, False),
    (np.str_("1"), False),
)  # fmt: skip


@pytest.mark.parametrize("value", GOOD, ids=range(len(GOOD)))
def test_what_can_be_shown_is_bounded_and_well_formed(value):
    [shown] = checked_observation(value).messages
    shown.content.encode()
    assert len(shown.content) < MAX_CHARACTERS + 50
    assert (" ... [cut: 65545 characters]" in shown.content) == (len(value.messages[0].content) > MAX_CHARACTERS)


@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_what_cannot_is_refused(value):
    with pytest.raises((TypeError, ValueError), match=r"step\(\) returned"):
        checked_observation(value)


@pytest.mark.parametrize(("value", "is_number"), REWARDS, ids=range(len(REWARDS)))
def test_rewards_are_finite_numbers_or_none(value, is_number):
    if not is_number:
        with pytest.raises((TypeError, ValueError), match=r"reward\(\) returned"):
            checked_reward(value)
    elif value is None:
        assert checked_reward(value) is None
    else:
        assert type(checked_reward(value)) is float and checked_reward(value) == float(value)


class Guest:
    """Returns or raises what it was told to, at each call."""

    closed: list[int] = []  # noqa: RUF012  of all, by prompt
    lock = threading.Lock()

    def __init__(self, number: int, rng: random.Random) -> None:
        self.number = number
        self.first = rng.choice([*GOOD, *BAD, OSError("gone"), SystemError()])
        self.last, _ = rng.choice(REWARDS)
        self.at_reset = rng.choice([None] * 9 + [KeyError("reset")])
        self.at_close = rng.choice([None] * 9 + [OSError("close")])

    def reset(self) -> None:
        if self.at_reset is not None:
            raise self.at_reset

    def step(self, answer: Answer) -> Observation:
        if answer.turn:
            return Observation(done=True)
        if isinstance(self.first, Exception):
            raise self.first
        return self.first

    def reward(self) -> Any:
        return self.last

    def close(self) -> None:
        with self.lock:
            Guest.closed.append(self.number)
        if self.at_close is not None:
            raise self.at_close


def play(count: int, seed: int) -> dict[int, Rollout]:
    rng = random.Random(seed)
    Guest.closed = []
    sampler = ScriptedSampler({key: [3, 3] for key in range(count)})
    done: dict[int, Rollout] = {}
    conversation = Conversation(
        factory=lambda p: Guest(p.index, rng), translator=Translator(), max_turns=4, timeout_seconds=60.0
    )
    run_rollouts(
        sampler, make_requests([prompt(i) for i in range(count)], rollouts_per_prompt=1, seed=0),
        max_response_tokens=40, on_rollout=done.__setitem__, conversation=conversation,
    )  # fmt: skip
    return done


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.extended)])
def test_no_guest_ends_a_run(count, caplog):
    caplog.set_level("ERROR")
    done = play(count, seed=count)
    assert sorted(done) == list(range(count))
    reasons = {rollout.stop_reason for rollout in done.values()}
    assert reasons == {StopReason.EOS, StopReason.TOOL_FAILED}
    failed = [r for r in done.values() if r.stop_reason is StopReason.TOOL_FAILED]
    assert 0.4 < len(failed) / count < 0.95
    assert all(rollout.reward is None or math.isfinite(rollout.reward) for rollout in done.values())
    for thread in threading.enumerate():
        if thread.name == "environment-close":
            thread.join(10)
    assert sorted(Guest.closed) == list(range(count)), "closed once each, also those that could not be reset"
