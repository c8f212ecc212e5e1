"""What a foreign environment returned, made safe or refused.

Environments are code of somebody else's: a tool may return None, a number, ten megabytes or half a character.  What can
be shown to a policy is bounded and well formed; everything else raises, which ends that rollout and no other.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable
from functools import cache
from typing import Any

import numpy as np

from megatron_rest.rollout.environments.base import Message, Observation

__all__ = ["MAX_CHARACTERS", "awaited", "checked_observation", "checked_reward"]

MAX_CHARACTERS = 65_536
"""Of one message; what is longer is cut, and says so."""

_ROLES = ("tool", "user")


def awaited(value: Any) -> Any:
    """``value``, or what it comes to if it is awaitable: any method of an environment may be ``async``.

    All of them share one event loop, in a thread of its own, so that sessions and locks made in one call serve the
    next.  Blocks the calling thread.
    """
    if not inspect.isawaitable(value):
        return value
    return asyncio.run_coroutine_threadsafe(_waiting_for(value), _event_loop()).result()


async def _waiting_for(value: Awaitable[Any]) -> Any:
    return await value


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="asynchronous environments", daemon=True).start()
    return loop


def checked_observation(value: Any) -> Observation:
    """``value`` of ``step()``, its texts bounded and without lone surrogates.  Raises TypeError or ValueError."""
    if not isinstance(value, Observation):
        raise TypeError(f"step() returned {_shown(value)}, expected an Observation")
    if value.done:
        return value
    if not isinstance(value.messages, (tuple, list)):
        raise TypeError(f"step() returned messages {_shown(value.messages)}, expected a tuple of Message")
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
    content = message.content
    if len(content) > MAX_CHARACTERS:
        content = content[:MAX_CHARACTERS] + f" ... [cut: {len(message.content)} characters]"
    return Message(role=message.role, content=content.encode("utf-8", errors="replace").decode())


def _shown(value: Any) -> str:
    """A type and, of small things that print themselves safely, the value."""
    if value is None or isinstance(value, (bool, float, np.generic)):
        return f"{value!r}"
    if isinstance(value, (str, bytes)):
        return f"{value[:40]!r}{' ...' if len(value) > 40 else ''}"
    return f"an object of type {type(value).__name__}"
