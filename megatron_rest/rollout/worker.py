"""An engine's own process: ``python -m megatron_rest.rollout.worker FD OWNER``, started by :class:`RemoteEngine`.

It makes the engine that the first message describes and then answers one call after another.  What was refused is said,
and the engine goes on; after any other failure nobody knows what state it is in, so that is said and this process ends.
When the rank that owns it goes, the connection ends, and so does this process, with all that vLLM has started under it.
"""

from __future__ import annotations

from megatron_rest.rollout.process import has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver())  # environment that torch and vLLM read when they are imported

import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

import numpy as np  # noqa: E402

from megatron_rest.config import ConfigError, RolloutConfig, from_dict  # noqa: E402
from megatron_rest.processes import when_gone  # noqa: E402
from megatron_rest.rollout.chat import ChatSettings  # noqa: E402
from megatron_rest.rollout.conversations import make_conversation  # noqa: E402
from megatron_rest.rollout.engine import Cut, EngineStateError, Exam, RefusedRequestError, RolloutRequest  # noqa: E402
from megatron_rest.rollout.environments.guest import see_off  # noqa: E402
from megatron_rest.rollout.keeper import end_processes, own_engine_folder  # noqa: E402
from megatron_rest.rollout.vllm_engine import VllmEngine  # noqa: E402
from megatron_rest.rollout.wire import Connection, ConnectionLostError  # noqa: E402
from megatron_rest.types import PromptSample, Rollout, StopReason  # noqa: E402

_BEAT_SECONDS = 1.0
_BYE_SECONDS = 5.0  # for environments whose close() is under way
_REFUSALS = (RefusedRequestError, EngineStateError, ConfigError)
_PASSED_ON = (
    "arguments",
    "weight_layout",
    "init_weight_transfer",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "received_weights",
    "reset_prefix_cache",
)


class Worker:
    """Serves the calls of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        spec = connection.receive()
        config: RolloutConfig = from_dict(RolloutConfig, spec["config"])
        chat = ChatSettings(**spec["chat"])
        self._engine = VllmEngine(
            spec["model_path"],
            config,
            seed=spec["seed"],
            max_model_len=spec["max_model_len"],
            stop_token_ids=spec["stop_token_ids"],
            transport=spec["transport"],
            random_weights=True,
            in_process=config.tensor_parallel == 1,
            conversation=make_conversation(config, spec["model_path"], chat),
            chat=chat,
        )
        self._last_beat = 0.0
        self._has_enough = True
        connection.send("result", value=None)

    def serve(self) -> None:
        """Until the owner says so or goes, or the engine breaks."""
        while True:
            message = self._connection.receive()
            kind = message["kind"]
            if kind in ("more", "enough", "cut"):  # of a run that was refused meanwhile
                continue
            if kind == "close":
                self._engine.close()
                self._connection.send("result", value=None)
                return
            try:
                self._answer(kind, message)
            except ConnectionLostError:
                raise
            except _REFUSALS as error:
                self._connection.send("refused", type=type(error).__name__, text=str(error))
            except Exception as error:  # noqa: BLE001  vLLM has many, none of which says what is left of the engine
                traceback.print_exc()
                self._connection.send("broken", type=type(error).__name__, text=str(error))
                return

    def _answer(self, kind: str, message: dict[str, Any]) -> None:
        engine, send = self._engine, self._connection.send
        if "version" in message:  # the owner's view counts: it is the one that verified the transfer
            engine.policy_version = message["version"]
        match kind:
            case "run":
                self._has_enough = not message["is_open"]
                engine.run(
                    _requests(message),
                    max_response_tokens=message["max_response_tokens"],
                    on_rollout=self._hand_over,
                    beat=self._beat,
                    exam=Exam(**message["exam"]) if message["exam"] else None,
                    more=self._more if message["is_open"] else None,
                )
                send("result", value=None)
            case "greedy":
                tokens, log_probs = engine.greedy(message["token_ids"], message["n"])
                send("result", {"tokens": tokens, "log_probs": log_probs})
            case "next_tokens":
                tokens, log_probs = engine.next_tokens(message["token_ids"], message["k"])
                send("result", {"tokens": tokens, "log_probs": log_probs})
            case "prompt_log_probs":
                send("result", {"log_probs": engine.prompt_log_probs(message["token_ids"])})
            case _ if kind in _PASSED_ON:
                send("result", value=getattr(engine, kind)(*message["arguments"]))
            case _:
                raise RefusedRequestError(f"unknown call {kind!r}")

    def _more(self) -> list[RolloutRequest] | Cut | None:
        """Requests that the owner has sent since the last look; None when it has said that there are no more."""
        requests: list[RolloutRequest] = []
        while not self._has_enough and self._connection.has_message():
            message = self._connection.receive()
            if message["kind"] == "more":
                requests += _requests(message)
                continue
            self._has_enough = True
            if message["kind"] == "cut":
                return Cut.NOW
        return None if self._has_enough and not requests else requests

    def _hand_over(self, key: int, rollout: Rollout) -> None:
        self._connection.send(
            "rollout",
            {name: getattr(rollout, name) for name in ("token_ids", "log_probs", "loss_mask", "versions")},
            key=key,
            prompt_id=rollout.prompt_id,
            stop_reason=str(rollout.stop_reason),
            policy_version=rollout.policy_version,
            reward=rollout.reward,
        )

    def _beat(self) -> None:
        """From the loop itself, so that a loop that hangs falls silent."""
        now = time.monotonic()
        if now - self._last_beat > _BEAT_SECONDS:
            self._last_beat = now
            self._connection.send("beat")


def _requests(message: dict[str, Any]) -> list[RolloutRequest]:
    requests = []
    offset = of_begun = 0
    for item in message["requests"]:
        token_ids = message["token_ids"][offset : offset + item["length"]]
        offset += item["length"]
        part = slice(of_begun, of_begun + item["begun"])
        of_begun += item["begun"]
        messages, tools, metadata = message["rows"].get(item["prompt_id"], ("[]", "[]", "{}"))
        prompt = PromptSample(
            prompt_id=item["prompt_id"],
            token_ids=token_ids,
            ground_truth=item["ground_truth"],
            index=item["index"],
            messages_json=messages,
            tools_json=tools,
            metadata_json=metadata,
        )
        begun = _begun(message, part, item["prompt_id"]) if item["begun"] else None
        requests.append(RolloutRequest(key=item["key"], prompt=prompt, seed=item["seed"], begun=begun))
    return requests


def _begun(message: dict[str, Any], part: slice, prompt_id: str) -> Rollout:
    versions = message["begun_versions"][part]
    return Rollout(
        prompt_id=prompt_id,
        token_ids=message["begun_ids"][part],
        log_probs=message["begun_log_probs"][part],
        loss_mask=np.ones(len(versions), bool),  # without an environment the policy samples all
        stop_reason=StopReason.CUT,
        policy_version=int(versions[-1]),
        versions=versions,
    )


def _end(status: int) -> NoReturn:
    """End this process and what vLLM started under it.  Peers of the transfer group may be gone: no destructor may wait
    for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    folder = own_engine_folder()
    if folder is not None:
        end_processes(folder, os.getsid(0))
    os._exit(status)


def main(argv: list[str]) -> None:
    """Serve the socket with file descriptor ``argv[0]``, for the process ``argv[1]``."""
    when_gone(int(argv[1]), lambda: _end(0))
    connection = Connection(socket.socket(fileno=int(argv[0])))
    status = 0
    try:
        Worker(connection).serve()
    except ConnectionLostError:  # the owner is gone; nobody is left to tell
        pass
    except BaseException:  # noqa: BLE001  it could not start; the owner quotes this
        traceback.print_exc()
        status = 1
    see_off(_BYE_SECONDS)
    _end(status)


if __name__ == "__main__":
    main(sys.argv[1:])
