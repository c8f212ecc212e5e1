"""The process of :mod:`megatron_rest.rollout.environments.workers`: lines of JSON in and out.

The first line in names the environment.  Each call runs in a thread of its own; what a call prints goes to the standard
error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import numpy as np

from megatron_rest.rollout.environments.base import Answer, Environment, EnvironmentFactory
from megatron_rest.rollout.environments.calls import Call, ParsedCalls
from megatron_rest.rollout.environments.find import find_environment
from megatron_rest.rollout.environments.guest import awaited, checked_observation, checked_reward
from megatron_rest.types import PromptSample

__all__ = ["main"]


class _Server:
    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self._name, self._arguments = name, arguments
        self._factory: EnvironmentFactory | None = None
        self._environments: dict[int, Environment] = {}
        self._lock = threading.Lock()
        self._replies = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)

    def answer(self, message: dict[str, Any]) -> None:
        try:
            said = self._call(message["environment"], message["do"], message)
        except BaseException as error:  # noqa: BLE001  told to the owner; this environment's alone
            said = {"error": f"{type(error).__name__}: {error}"}
        line = json.dumps({"call": message["call"], **said}).encode() + b"\n"
        with self._lock:
            self._replies.write(line)
            self._replies.flush()

    def _call(self, key: int, do: str, message: dict[str, Any]) -> dict[str, Any]:
        if do == "make":
            self._environments[key] = self._find()(_prompt(message["prompt"]))
            return {}
        if do == "close":
            awaited(self._environments.pop(key).close())
            return {}
        environment = self._environments[key]
        if do == "reset":
            awaited(environment.reset())
            return {}
        if do == "reward":
            return {"reward": checked_reward(awaited(environment.reward()))}
        observation = checked_observation(awaited(environment.step(_answer(message["answer"]))))
        return {"done": observation.done, "messages": [[m.role, m.content] for m in observation.messages]}

    def _find(self) -> EnvironmentFactory:
        with self._lock:
            if self._factory is None:
                self._factory = find_environment(self._name, self._arguments)
        return self._factory


def _prompt(values: dict[str, Any]) -> PromptSample:
    return PromptSample(**{**values, "token_ids": np.asarray(values["token_ids"], np.int32)})


def _answer(values: dict[str, Any]) -> Answer:
    calls = tuple(Call(name, arguments) for name, arguments in values["calls"])
    parsed = ParsedCalls(calls, tuple(values["errors"]))
    return Answer(text=values["text"], calls=parsed, turn=values["turn"])


def main() -> None:
    """Serve until the owner closes the pipe, or is gone."""
    server = _Server(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        threading.Thread(target=server.answer, args=(json.loads(line),), daemon=True).start()
    os._exit(0)  # calls that nobody waits for may run


if __name__ == "__main__":
    main()
