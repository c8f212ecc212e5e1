"""A reward function in processes of its own, with a time limit that nothing in it can escape.

A worker reads one JSON line an answer and writes one back; nothing is pickled.  One that does not answer in time, or
ends, is killed and started again: the answer it had is the only one that is lost.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

from megatron_rest.processes import end_worker, start_worker
from megatron_rest.rewards.functions import RewardInput
from megatron_rest.user_code import NamedCode

__all__ = ["RewardWorkers"]

_START_SECONDS = 300.0  # imports of the user's package: torch and a model, say
_LARGEST_LINE = 1 << 24


class RewardWorkers:
    """``num_workers`` processes that call one function.

    Args:
        named: the function.
        num_workers: processes.
        timeout_seconds: for one answer.
    """

    def __init__(self, named: NamedCode, *, num_workers: int, timeout_seconds: float) -> None:
        self._workers = [_Worker(named, timeout_seconds) for _ in range(num_workers)]

    def __call__(self, answers: Sequence[RewardInput]) -> list[Any]:
        """What the function said of each, as plain values; an exception where it failed."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(answers)):
            waiting.put(i)
        said: list[Any] = [None] * len(answers)

        def work(worker: _Worker) -> None:
            while True:
                try:
                    i = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    said[i] = worker.ask(answers[i])
                except Exception as error:  # noqa: BLE001  this answer's fault alone
                    said[i] = error

        threads = [threading.Thread(target=work, args=(w,), daemon=True) for w in self._workers[: len(answers)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return said

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.kill()


class _Worker:
    def __init__(self, named: NamedCode, timeout_seconds: float) -> None:
        self._named = named
        self._timeout = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, answer: RewardInput) -> Any:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(answer.to_json()).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._read(self._timeout)
        except (OSError, TimeoutError):
            self.kill()
            raise
        if "error" in reply:
            raise RuntimeError(str(reply["error"]))
        return reply["reward"]

    def kill(self) -> None:
        if self._process is not None:
            end_worker(self._process)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _start(self) -> None:
        self._process = start_worker("megatron_rest.rewards.worker", self._named.key, self._named.reference)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dict(self._named.arguments)).encode() + b"\n")
        self._process.stdin.flush()
        try:
            ready = self._read(_START_SECONDS)
            if "error" in ready:
                raise RuntimeError(str(ready["error"]))
        except Exception:
            self.kill()
            raise

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()  # not select(): a file descriptor may be above 1023
        poll.register(fd, select.POLLIN)
        end = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                raise TimeoutError(f"no reward within {seconds:g} s (reward.call_timeout_seconds)")
            part = os.read(fd, 1 << 16)
            if not part:
                raise ConnectionError(f"the reward's process ended with status {self._process.wait()}")
            line += part
            if len(line) > _LARGEST_LINE:
                raise ConnectionError("the reward's process said more than 16 MB about one answer")
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise ConnectionError(f"the reward's process said {line[:60]!r}")
        return reply
