"""A foreign environment as a guest: asked in a thread of its own, what it returns made safe or refused, always closed.

Environments are code of somebody else's: a tool may return None, a number, ten megabytes or half a character, or may
not return.  What can be shown to a policy is bounded and well formed; everything else raises, which ends that rollout
and no other.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from megatron_rest.errors import described
from megatron_rest.rollout.environments.base import Answer, Environment, EnvironmentFactory, Message, Observation
from megatron_rest.types import PromptSample

__all__ = ["MAX_CHARACTERS", "MAX_MESSAGES", "Guest", "awaited", "checked_observation", "checked_reward", "see_off"]

MAX_CHARACTERS = 65_536
"""Of one message; what is longer is cut, and says so."""
MAX_MESSAGES = 64
"""Of one observation; more are refused."""

_ROLES = ("tool", "user")
_GRACE_SECONDS = 5.0  # for a call that ran out of time: close() comes behind it, or after these beside it
_ANSWER_SECONDS = 1.0  # of an event loop that is not held up

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Guest:
    """One environment: made and reset when it is first asked, asked by one thread at a time, closed in the end.

    A call that nobody waits for any more cannot be ended.  But nothing follows it: what was about to be asked next is
    not, a coroutine is cancelled, and ``close()`` comes when the call is back.  One that does not come back soon may
    wait for something that ``close()`` ends: then it is closed meanwhile, and once more if it does come back, for what
    it may have made.
    """

    def __init__(self, factory: EnvironmentFactory, prompt: PromptSample) -> None:
        self._factory, self._prompt = factory, prompt
        self._environment: Environment | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: _Coroutine | None = None
        self._is_over = False
        self._is_closed = False
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()

    def ask(self, call: Callable[[], _T], then: Callable[[_T | None, BaseException | None], None]) -> None:
        """Run ``call``, which asks this guest, in a thread of its own; ``then`` takes there what it returned or raised.

        A guest that cannot even be given a thread has failed like one that raises.
        """

        def run() -> None:
            result, failure = None, None
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001  foreign code: SystemExit must not end a thread in silence
                failure = error
            with self._lock:
                self._idle.set()  # before anybody can ask the next thing
                is_late = self._is_closed
            then(result, failure)
            if is_late:
                self._close()

        self._idle.clear()
        try:
            threading.Thread(target=run, name="environment", daemon=True).start()
        except RuntimeError as error:  # too many of them hang
            self._idle.set()
            then(None, error)

    def step(self, answer: Answer) -> Observation:
        """Inside of :meth:`ask`.  Raises TypeError or ValueError for what is no observation."""
        environment = self._enter()
        return checked_observation(self._finished(lambda: environment.step(answer)))

    def reward(self) -> float | None:
        """Inside of :meth:`ask`.  Raises TypeError or ValueError for what is no finite number."""
        environment = self._enter()
        return checked_reward(self._finished(environment.reward))

    def leave(self) -> None:
        """Nothing more is asked: close it.  Returns at once."""
        self._is_over = True
        waiting = self._waiting
        if waiting is not None:
            waiting.cancel()
        if self._environment is None and self._idle.is_set():
            return
        thread = threading.Thread(target=self._leave, name="environment-close", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            _log.warning("an environment cannot be closed: no thread can be started")
            return
        _leaving.add(thread)

    def _leave(self) -> None:
        try:
            self._idle.wait(_GRACE_SECONDS)
            if self._waiting is not None and self._loop is not None:
                _replace_if_held_up(self._loop)
            with self._lock:
                self._is_closed = not self._idle.is_set()
            self._close()
        finally:
            _leaving.discard(threading.current_thread())

    def _close(self) -> None:
        environment = self._environment
        try:
            if environment is not None:
                awaited(environment.close(), self._loop)
        except BaseException as error:  # noqa: BLE001  foreign code; its rollout is over
            _log.warning("closing the environment of prompt %s failed: %s", self._prompt.prompt_id, described(error))

    def _enter(self) -> Environment:
        if self._environment is None:
            self._environment = environment = self._finished(lambda: self._factory(self._prompt), is_awaited=False)
            self._finished(environment.reset)
        return self._environment

    def _finished(self, call: Callable[[], Any], *, is_awaited: bool = True) -> Any:
        """What ``call`` comes to.  Raises TimeoutError instead of calling when nobody waits for it any more."""
        if self._is_over:
            raise TimeoutError("its rollout is over")
        value = call()
        if not is_awaited or not inspect.isawaitable(value):
            return value
        if self._loop is None:
            self._loop = _event_loop()
        self._waiting = _Coroutine(value, self._loop)
        if self._is_over:
            self._waiting.cancel()
        try:
            return self._waiting.result()
        finally:
            self._waiting = None


_leaving: set[threading.Thread] = set()


def see_off(seconds: float) -> None:
    """Wait until all guests that were left are closed, for ``seconds`` at most; for the end of a process."""
    deadline = time.monotonic() + seconds
    for thread in list(_leaving):
        thread.join(max(deadline - time.monotonic(), 0.0))


class _Coroutine:
    """An awaitable on an event loop, for a thread that waits until it has really ended, cancelled or not."""

    def __init__(self, value: Awaitable[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._outcome: Future[Any] = Future()
        self._task: asyncio.Task[Any] | None = None
        loop.call_soon_threadsafe(self._begin, value)

    def result(self) -> Any:
        return self._outcome.result()

    def cancel(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(lambda: self._task is not None and self._task.cancel())

    def _begin(self, value: Awaitable[Any]) -> None:
        self._task = self._loop.create_task(_waiting_for(value))
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[Any]) -> None:
        error = TimeoutError("cancelled") if task.cancelled() else task.exception()
        if error is not None:
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(task.result())


async def _waiting_for(value: Awaitable[Any]) -> Any:
    try:
        return await value
    except (SystemExit, KeyboardInterrupt) as error:  # would end the loop, and all that share it
        raise RuntimeError(described(error)) from error


def awaited(value: Any, loop: asyncio.AbstractEventLoop | None = None) -> Any:
    """``value``, or what it comes to if it is awaitable: any method of an environment may be ``async``.

    All of them share one event loop, in a thread of its own, so that sessions and locks made in one call serve the
    next.  Blocks the calling thread.
    """
    return _Coroutine(value, loop or _event_loop()).result() if inspect.isawaitable(value) else value


_loops: list[asyncio.AbstractEventLoop] = []  # the last one is in use
_making = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    with _making:
        if not _loops:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="asynchronous environments", daemon=True).start()
            _loops.append(loop)
        return _loops[-1]


def _replace_if_held_up(loop: asyncio.AbstractEventLoop) -> None:
    """A coroutine that computes or sleeps without awaiting holds up all that share its loop: the next environments get
    another one."""
    answer = threading.Event()
    loop.call_soon_threadsafe(answer.set)
    if not answer.wait(_ANSWER_SECONDS):
        with _making:
            if loop in _loops:
                _loops.remove(loop)
                _log.warning("an asynchronous environment computes without awaiting: others get another event loop")


def checked_observation(value: Any) -> Observation:
    """``value`` of ``step()``, its texts bounded and without lone surrogates.  Raises TypeError or ValueError."""
    if not isinstance(value, Observation):
        raise TypeError(f"step() returned {_shown(value)}, expected an Observation")
    if value.done:
        return Observation(done=True)
    if not isinstance(value.messages, (tuple, list)):
        raise TypeError(f"step() returned messages {_shown(value.messages)}, expected a tuple of Message")
    if len(value.messages) > MAX_MESSAGES:
        raise ValueError(f"step() returned {len(value.messages)} messages, expected {MAX_MESSAGES} at most")
    return Observation(messages=tuple(_checked_message(message) for message in value.messages))


def checked_reward(value: Any) -> float | None:
    """``value`` of ``reward()`` as a float.  Raises TypeError or ValueError if it is no finite number and not None."""
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        raise TypeError(f"reward() returned {_shown(value)}, expected a finite number or None (judge the text)")
    try:
        number = float(value)
    except OverflowError:  # an int may be larger than any float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"reward() returned {_shown(value)}, expected a finite number or None (judge the text)")
    return number


def _checked_message(message: Any) -> Message:
    if not isinstance(message, Message):
        raise TypeError(f"step() returned the message {_shown(message)}, expected a Message")
    if message.role not in _ROLES:
        raise ValueError(f"step() returned a message of role {_shown(message.role)}, expected {' or '.join(_ROLES)}")
    if not isinstance(message.content, str):
        raise TypeError(f"step() returned a message whose content is {_shown(message.content)}, expected text")
    content = str.__str__(message.content)  # of a subclass its text, whatever its methods do
    if len(content) > MAX_CHARACTERS:
        content = content[:MAX_CHARACTERS] + f" ... [cut: {len(content)} characters]"
    return Message(role=message.role, content=content.encode("utf-8", errors="replace").decode())


def _shown(value: Any) -> str:
    """A type and, of small things that print themselves safely, the value."""
    if value is None or isinstance(value, (bool, float, np.generic)):
        return f"{value!r}"
    if isinstance(value, (str, bytes)):
        return f"{value[:40]!r}{' ...' if len(value) > 40 else ''}"
    return f"an object of type {type(value).__name__}"
