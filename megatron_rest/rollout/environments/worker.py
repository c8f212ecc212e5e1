"""The process of :mod:`megatron_rest.rollout.environments.workers`: lines of JSON in and out.

The first line in names the environment, the first line out says that it can be made.  Each call runs in a thread of its
own; what a call prints goes to the standard error.
"""

from __future__ import annotations

import json
import os
import threading
from typing import IO, Any

import numpy as np

from megatron_rest.errors import described
from megatron_rest.processes import serve_as_worker
from megatron_rest.rollout.environments.base import Answer, Environment, EnvironmentFactory
from megatron_rest.rollout.environments.calls import Call, ParsedCalls
from megatron_rest.rollout.environments.find import find_environment
from megatron_rest.rollout.environments.guest import awaited, checked_observation, checked_reward
from megatron_rest.types import PromptSample

__all__ = ["main"]


class _Server:
    def __init__(self, replies: IO[bytes], name: str, arguments: dict[str, Any]) -> None:
        self._factory: EnvironmentFactory = find_environment(name, arguments)
        self._environments: dict[int, Environment] = {}
        self._lock = threading.Lock()
        self._replies = replies

    def answer(self, message: dict[str, Any]) -> None:
        try:
            said = self._call(message["environment"], message["do"], message)
        except BaseException as error:  # noqa: BLE001  told to the owner; this environment's alone
            said = {"error": described(error)}
        with self._lock:
            _say(self._replies, {"call": message["call"], **said})

    def _call(self, key: int, do: str, message: dict[str, Any]) -> dict[str, Any]:
        if do == "reset":
            environment = self._environments[key] = self._factory(_prompt(message["prompt"]))
            awaited(environment.reset())
            return {}
        if do == "close":
            made = self._environments.pop(key, None)
            if made is not None:
                awaited(made.close())
            return {}
        environment = self._environments[key]
        if do == "reward":
            return {"reward": checked_reward(awaited(environment.reward()))}
        observation = checked_observation(awaited(environment.step(_answer(message["answer"]))))
        return {"done": observation.done, "messages": [[m.role, m.content] for m in observation.messages]}


def _say(replies: IO[bytes], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


def _prompt(values: dict[str, Any]) -> PromptSample:
    return PromptSample(**{**values, "token_ids": np.asarray(values["token_ids"], np.int32)})


def _answer(values: dict[str, Any]) -> Answer:
    calls = tuple(Call(name, arguments) for name, arguments in values["calls"])
    parsed = ParsedCalls(calls, tuple(values["errors"]))
    return Answer(text=values["text"], calls=parsed, turn=values["turn"])


def main() -> None:
    """Serve until the owner closes the pipe, or is gone."""
    requests, replies = serve_as_worker()
    try:
        server = _Server(replies, **json.loads(requests.readline()))
    except BaseException as error:  # noqa: BLE001  foreign code, as it is imported
        _say(replies, {"error": described(error)})
        os._exit(1)
    _say(replies, {})
    for line in requests:
        threading.Thread(target=server.answer, args=(json.loads(line),), daemon=True).start()
    os._exit(0)  # calls that nobody waits for may run


if __name__ == "__main__":
    main()
