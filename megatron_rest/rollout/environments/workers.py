"""Environments in processes of their own, so that what they compute takes no core from the engine's loop.

Each process holds many at once, in threads, and speaks lines of JSON; nothing is pickled.  A process that ends takes
its own environments with it, which ends their rollouts and no other; the next environment starts another one.  One that
has a call nobody waits for any more (its rollout ran out of time, and the call did not come back) gets no further
environments and is killed, with what its environments have started, when the rest of its own are closed: the call might
compute for ever.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import subprocess
import threading
from collections.abc import Mapping
from typing import Any

from megatron_rest.errors import RunError
from megatron_rest.processes import end_worker, start_worker
from megatron_rest.rollout.environments.base import Answer, Environment, Message, Observation
from megatron_rest.types import PromptSample

__all__ = ["EnvironmentWorkers"]

_MODULE = "megatron_rest.rollout.environments.worker"
_LARGEST_LINE = 1 << 26
_START_SECONDS = 300.0


class EnvironmentWorkers:
    """Makes environments, as an ``EnvironmentFactory`` does, each in the process that has the fewest.

    All processes are started here and have imported the environment when this returns: no rollout's time limit pays for
    that, but where the last process was lost and its successor still starts.

    Args:
        name: as ``rollout.environment``.
        arguments: of its factory.
        num_workers: processes.

    Raises RunError if a process cannot make them, with what it said.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], *, num_workers: int) -> None:
        self._name, self._arguments = name, dict(arguments)
        self._workers = [_Worker(self._name, self._arguments) for _ in range(num_workers)]
        self._retired: list[_Worker] = []  # some of whose environments may still be asked
        self._lock = threading.Lock()
        try:
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __call__(self, prompt: PromptSample) -> Environment:
        """It is made with ``reset()``, which may take long: until then there would be nothing that can be closed."""
        with self._lock:
            for place, worker in enumerate(self._workers):
                if not worker.is_open:
                    self._retired = [w for w in (*self._retired, worker) if w.is_alive]
                    self._workers[place] = _Worker(self._name, self._arguments)
            worker = min(self._workers, key=lambda each: (not each.is_ready, each.num_environments))
            return _InProcess(worker, worker.new_key(), prompt)

    def close(self) -> None:
        """End all processes, whatever they are at."""
        with self._lock:
            for worker in (*self._workers, *self._retired):
                worker.end()


class _InProcess:
    """One environment of a worker.

    Its calls raise what the environment raised, as a RuntimeError, and ConnectionError when the process has ended.
    """

    def __init__(self, worker: _Worker, key: int, prompt: PromptSample) -> None:
        self._worker, self._key, self._prompt = worker, key, prompt

    def reset(self) -> None:
        self._worker.ask(self._key, "reset", prompt=_prompt(self._prompt))

    def step(self, answer: Answer) -> Observation:
        calls = {"calls": [[c.name, c.arguments] for c in answer.calls.calls], "errors": list(answer.calls.errors)}
        said = self._worker.ask(self._key, "step", answer={"text": answer.text, "turn": answer.turn, **calls})
        if said["done"]:
            return Observation(done=True)
        return Observation(messages=tuple(Message(role=role, content=text) for role, text in said["messages"]))

    def reward(self) -> float | None:
        reward: float | None = self._worker.ask(self._key, "reward")["reward"]
        return reward

    def close(self) -> None:
        if self._worker.is_busy(self._key):
            self._worker.retire()
        else:
            with contextlib.suppress(ConnectionError):  # it is gone, as was asked
                self._worker.ask(self._key, "close")
        self._worker.forget(self._key)


class _Worker:
    """A process and what it is asked, by many threads at once."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        self._process: subprocess.Popen[bytes] = start_worker(_MODULE)
        self._writing, self._lock = threading.Lock(), threading.Lock()  # a process that does not read holds the first
        self._waiting: dict[int, tuple[int, queue.SimpleQueue[dict[str, Any]]]] = {}  # environment and answer of a call
        self._keys: set[int] = set()
        self._numbers = itertools.count()
        self.is_open = True
        """Whether it takes further environments."""
        self._ready = threading.Event()  # it has imported the environment, or will never
        self._lost = ""
        self._send({"name": name, "arguments": arguments})
        threading.Thread(target=self._read, name="environment worker", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    def wait_until_ready(self) -> None:
        """Raises RunError if it is not within five minutes (a package that imports torch and loads a model, say)."""
        if not self._ready.wait(_START_SECONDS):
            self._lost = f"not ready within {_START_SECONDS:g} s"
        if self._lost:
            raise RunError(f"rollout.environment_workers: a process for environments did not start: {self._lost}")

    @property
    def num_environments(self) -> int:
        return len(self._keys)

    def new_key(self) -> int:
        with self._lock:
            key = next(self._numbers)
            self._keys.add(key)
        return key

    def forget(self, key: int) -> None:
        """An environment that is not asked any more; the last one of a retired process ends it."""
        with self._lock:
            self._keys.discard(key)
            is_over = not (self._keys or self.is_open)
        if is_over:
            end_worker(self._process)

    def retire(self) -> None:
        self.is_open = False

    def end(self) -> None:
        self.is_open = False
        end_worker(self._process)

    def is_busy(self, key: int) -> bool:
        """Whether a call to it is under way."""
        with self._lock:
            return any(owner == key for owner, _ in self._waiting.values())

    def ask(self, key: int, do: str, **values: Any) -> dict[str, Any]:
        """Wait for the answer, for as long as it takes: who cannot wait gives this thread up."""
        answer: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = key, answer
        try:
            self._send({"call": number, "environment": key, "do": do, **values})
        except OSError as error:
            self._lose(str(error))
        said = answer.get()
        if "lost" in said:
            raise ConnectionError(f"the environments' process ended: {said['lost']}")
        if "error" in said:
            raise RuntimeError(str(said["error"]))
        return said

    def _send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        assert self._process.stdin is not None
        with self._writing:
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read(self) -> None:
        """In a thread: answers to whoever waits for them."""
        assert self._process.stdout is not None
        why = ""
        while line := self._process.stdout.readline(_LARGEST_LINE):
            try:
                said = json.loads(line)
                if not self._ready.is_set():
                    if "error" in said:
                        why = str(said["error"])
                        break
                    self._ready.set()
                    continue
                with self._lock:
                    _, answer = self._waiting.pop(said["call"])
            except (ValueError, KeyError, TypeError):
                why = f"it said {line[:60]!r}"
                end_worker(self._process)
                break
            answer.put(said)
        status = self._process.wait()
        end_worker(self._process)  # what its environments have started
        self._lose(why or f"status {status}")

    def _lose(self, why: str) -> None:
        self.is_open, self._lost = False, why
        self._ready.set()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for _, answer in waiting.values():
            answer.put({"lost": why})


def _prompt(prompt: PromptSample) -> dict[str, Any]:
    names = ("prompt_id", "ground_truth", "index", "messages_json", "tools_json", "metadata_json")
    return {"token_ids": prompt.token_ids.tolist(), **{name: getattr(prompt, name) for name in names}}
