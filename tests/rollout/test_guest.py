"""What foreign environments return: safe, or the end of that rollout and of no other.

Thousands of guests return whatever their kind can: None, numbers of numpy, bytes, half characters, megabytes, objects
that cannot be printed.  Every rollout ends once, with a reason; texts are bounded; every environment is closed.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_rest.rollout.engine import make_requests
from megatron_rest.rollout.environments import guest
from megatron_rest.rollout.environments.base import Answer, Message, Observation
from megatron_rest.rollout.environments.guest import (
    MAX_CHARACTERS,
    MAX_MESSAGES,
    checked_observation,
    checked_reward,
    see_off,
)
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
    Observation(messages=(Message(role="tool", content="x"),) * (MAX_MESSAGES + 1)),
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
        self.first = rng.choice([*GOOD, *BAD, OSError("gone"), ValueError(Unprintable()), SystemExit(3)])
        self.last, _ = rng.choice(REWARDS)
        self.at_reset = rng.choice([None] * 9 + [KeyError("reset")])
        self.at_close = rng.choice([None] * 9 + [OSError("close")])

    def reset(self) -> None:
        if self.at_reset is not None:
            raise self.at_reset

    def step(self, answer: Answer) -> Observation:
        if answer.turn:
            return Observation(done=True)
        if isinstance(self.first, BaseException):
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
    see_off(60.0)
    assert sorted(Guest.closed) == list(range(count)), "closed once each, also those that could not be reset"


class LateGuest:
    """Takes its time at one call, and notes in ``done`` what came to its end."""

    def __init__(self, where: str, may_go_on: threading.Event, done: list[str]) -> None:
        self.where, self.may_go_on, self.done = where, may_go_on, done
        self._do("make")

    def _do(self, name: str) -> None:
        if self.where == name:
            self.may_go_on.wait(60)
        self.done.append(name)

    def reset(self) -> None:
        self._do("reset")

    def step(self, answer: Answer) -> Observation:
        self._do("step")
        return Observation(done=True)

    def reward(self) -> float:
        self._do("reward")
        return 1.0

    def close(self) -> None:
        self._do("close")


class LateAsyncGuest(LateGuest):
    """The same, awaiting: it is cancelled.  Or not awaiting, which holds up all that share its event loop."""

    async def step(self, answer: Answer) -> Observation:  # type: ignore[override]
        self._do("step")
        try:
            await asyncio.sleep(3600)
        finally:
            self.done.append("cancelled")
        return Observation(done=True)

    async def close(self) -> None:  # type: ignore[override]
        super().close()


def play_one(make: Callable[[], Any], seconds: float) -> StopReason:
    done: dict[int, Rollout] = {}
    conversation = Conversation(factory=lambda p: make(), translator=Translator(), max_turns=4, timeout_seconds=seconds)
    run_rollouts(
        ScriptedSampler({0: [3, 3]}), make_requests([prompt(0)], rollouts_per_prompt=1, seed=0),
        max_response_tokens=40, on_rollout=done.__setitem__, conversation=conversation,
    )  # fmt: skip
    return done[0].stop_reason


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("where", ["make", "reset", "step", "reward"])
def test_what_comes_back_late_is_asked_nothing_more_and_closed(where):
    """Also what did not exist yet when its time was over; behind the call, not beside it."""
    done: list[str] = []
    may_go_on = threading.Event()
    assert play_one(lambda: LateGuest(where, may_go_on, done), seconds=0.2) is StopReason.TOOL_TIMEOUT
    may_go_on.set()
    see_off(60.0)
    order = ["make", "reset", "step", "reward"]
    assert done == [*order[: order.index(where) + 1], "close"]


def test_what_does_not_come_back_is_closed_beside_it_and_again_behind_it(monkeypatch):
    monkeypatch.setattr(guest, "_GRACE_SECONDS", 0.1)
    done: list[str] = []
    may_go_on = threading.Event()
    assert play_one(lambda: LateGuest("reset", may_go_on, done), seconds=0.2) is StopReason.TOOL_TIMEOUT
    see_off(60.0)
    assert done == ["make", "close"]
    may_go_on.set()
    wait_until(lambda: done == ["make", "close", "reset", "close"])


def test_an_asynchronous_call_that_is_late_is_cancelled():
    done: list[str] = []
    make = lambda: LateAsyncGuest("", threading.Event(), done)  # noqa: E731
    assert play_one(make, seconds=0.2) is StopReason.TOOL_TIMEOUT
    see_off(60.0)
    assert done == ["make", "reset", "step", "cancelled", "close"]


def test_an_asynchronous_guest_that_does_not_await_holds_up_itself_alone(monkeypatch):
    monkeypatch.setattr(guest, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(guest, "_ANSWER_SECONDS", 0.1)
    held, others = [], []
    may_go_on = threading.Event()
    assert play_one(lambda: LateAsyncGuest("step", may_go_on, held), seconds=0.2) is StopReason.TOOL_TIMEOUT
    before = guest._loops[-1:]
    wait_until(lambda: guest._loops[-1:] != before)
    assert play_one(lambda: Quick(others), seconds=60.0) is StopReason.EOS
    may_go_on.set()
    wait_until(lambda: held[-1:] == ["close"])


class Quick:
    """Asynchronous, and done at once."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    async def reset(self) -> None: ...

    async def step(self, answer: Answer) -> Observation:
        await asyncio.sleep(0)
        return Observation(done=True)

    async def reward(self) -> float:
        return 1.0

    async def close(self) -> None:
        self.done.append("close")


def test_a_guest_that_gets_no_thread_ends_its_rollout(monkeypatch):
    """Thousands that hang have all of them."""

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(guest.threading, "Thread", NoThread)
    assert play_one(lambda: Quick([]), seconds=60.0) is StopReason.TOOL_FAILED
