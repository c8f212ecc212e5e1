"""One rank's engine process through all its lives: started, given weights, lost, started again.

    starting  -> ready (holds no weights) -> serving -> lost -> starting ...

It starts in a thread, so that its owner's rank is free for the others meanwhile.
"""

from __future__ import annotations

import logging
import threading

from megatron_rest.help_topics import Topic, see
from megatron_rest.rollout.engine import NO_WEIGHTS, EngineLostError
from megatron_rest.rollout.remote import RemoteEngine

__all__ = ["Station"]

_log = logging.getLogger(__name__)


class Station:
    """An engine that its owner never has to look after.

    Args:
        engine: whose process has just been started.
        max_restarts: losses in a row that are made good.
    """

    def __init__(self, engine: RemoteEngine, *, max_restarts: int) -> None:
        self.engine = engine
        self.num_restarts = 0
        self.is_serving = False
        """Whether the engine was given weights that it proved to hold, and nobody has found it lost since."""
        self.error: Exception | None = None
        """What cannot be made good; the run ends with it."""
        self._max_restarts = max_restarts
        self._in_a_row = 0
        self._is_lost = False  # until its successor has started
        self._thread = self._start(is_first=True)

    @property
    def is_ready(self) -> bool:
        """Whether it has started and can take weights."""
        return not self._is_lost and not self._thread.is_alive() and self.engine.is_ready

    @property
    def is_waiting(self) -> bool:
        """Whether it could sample if it had weights."""
        return self.is_ready and not self.is_serving

    def look(self) -> None:
        """Notice an engine that ended while nobody asked it anything."""
        if self.error is None and not (self._is_lost or self._thread.is_alive() or self.engine.is_alive):
            self.lose(EngineLostError(f"the engine of {self.engine.machine} ended"), "it had nothing to do")

    def lose(self, error: Exception, under_way: str) -> None:
        """Start a new process in the place of the lost one; after too many losses in a row keep :attr:`error`."""
        self._is_lost = True  # first: a process that hangs would look like one that waits for weights
        self.engine.policy_version, self.is_serving = NO_WEIGHTS, False
        if self._may_restart(error, under_way):
            self._thread = self._start(is_first=False)

    def praise(self) -> None:
        """It has done what was asked of it: losses before this are not in a row with those after it."""
        self._in_a_row = 0

    def _may_restart(self, error: Exception, under_way: str) -> bool:
        self._in_a_row += 1
        if self._in_a_row > self._max_restarts:
            self.error = EngineLostError(
                f"engines were lost {self._in_a_row} times in a row while {under_way} (rollout.max_restarts "
                f"{self._max_restarts}); last here: {error}{see(Topic.ENGINES_RESTART)}"
            )
            self.error.__cause__ = error
            return False
        _log.warning("%s; a new one is started", error)
        self.num_restarts += 1
        return True

    def _start(self, *, is_first: bool) -> threading.Thread:
        thread = threading.Thread(target=self._bring_up, args=(is_first,), name="engine start", daemon=True)
        thread.start()
        return thread

    def _bring_up(self, is_there: bool) -> None:
        while True:
            try:
                if not is_there:
                    self.engine.restart()
                self.engine.wait_ready()
                self._is_lost = False
                return
            except (EngineLostError, OSError) as error:  # OSError: the node that had it cannot be reached
                if not self._may_restart(error, "starting"):
                    return
                is_there = False
            except Exception as error:  # noqa: BLE001  carried to the main thread
                self.error = error
                return
