"""A time limit for code of this process: judging one answer must end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_rest.errors import RunError

__all__ = ["JudgingTooLongError", "time_limit"]


class JudgingTooLongError(RunError):
    """Judging an answer did not end in time; the message says which."""

    is_on_every_rank = False


@contextmanager
def time_limit(seconds: float, what: str, *, key: str = "reward.timeout_seconds") -> Iterator[None]:
    """Raise :class:`JudgingTooLongError` in the block after ``seconds``, which ``key`` sets.

    By SIGALRM, which Python code and its regular expressions obey, so in the main thread alone; elsewhere there is no
    limit.  A timer that runs already (a test's) goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(signum: int, frame: FrameType | None) -> None:
        raise JudgingTooLongError(f"{what} took longer than {seconds:g} s ({key})")

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, expired)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)
