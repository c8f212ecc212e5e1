"""A rank's handle of an engine in a process of its own: calls with a time limit, death noticed, restart.

Whatever happens to the process (killed, crashed, hung, out of memory, one of its workers gone) ends in one of two ways:
the call returns, or it raises :class:`EngineLostError` and the process is gone.  A process that gives no sign of life
for ``rollout.engine_timeout_seconds`` is ended, so nothing waits for it for ever, a peer in a weight transfer included.
Only what the engine refuses to do is an error of the caller (:class:`EngineCallError`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rest.config import RolloutConfig, to_dict
from megatron_rest.help_topics import Topic, see
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.engine import (
    NO_WEIGHTS,
    Cut,
    EngineLostError,
    EngineStateError,
    Exam,
    MoreRequests,
    OnRollout,
    RolloutRequest,
)
from megatron_rest.rollout.host import EngineHost, ask_for_engine, start_worker
from megatron_rest.rollout.wire import Connection, ConnectionLostError
from megatron_rest.types import Rollout, StopReason

__all__ = ["EngineCallError", "RemoteEngine"]

_START_SECONDS = 1800.0  # a large model's engine reads, compiles and captures graphs before its first sign of life
_CLOSE_SECONDS = 30.0
_BEHIND_SECONDS = 15.0  # how far, on a busy machine, the end of a process may lie behind that of its connection
_LOOK_SECONDS = 1.0  # between looks whether the process is there: vLLM's own may keep the connection open
_ASK_SECONDS = 0.1  # between questions for more, while nothing comes: a cut does not wait for the next rollout
_LOG_BYTES, _LOG_LINES = 8192, 12  # of the end of a process's output: kept, and quoted when it is lost


Packed = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Requests as arrays and plain values."""

MorePacked = Callable[[], "Packed | Cut | None"]
"""As ``MoreRequests``."""


class EngineCallError(RuntimeError):
    """The engine lives and refused a call; type and text are its own."""


class RemoteEngine:
    """One vLLM engine in a process of its own; a rollout engine and a target of weight transfers.

    Args:
        model_path: HF folder with ``config.json``; weights come by transfer only.
        config: sampling, memory and time limits.
        seed, max_model_len, stop_token_ids, chat: as for :class:`~megatron_rest.rollout.vllm_engine.VllmEngine`.
        transport: how weights come (``weight_sync.transport``).
        devices: GPUs of the process, indices with commas among those that its starter sees; None: all of them.
        host: another node that starts the process; None starts it here.

    The process starts at once, and the first call waits for it, so that several start at the same time.
    """

    def __init__(
        self,
        model_path: str | Path,
        config: RolloutConfig,
        *,
        seed: int,
        max_model_len: int,
        stop_token_ids: Sequence[int] = (),
        transport: str = "gloo",
        devices: str | None = None,
        host: EngineHost | None = None,
        chat: ChatSettings | None = None,
    ) -> None:
        self._spec = {
            "model_path": str(model_path),
            "config": to_dict(config),
            "seed": seed,
            "max_model_len": max_model_len,
            "stop_token_ids": [int(i) for i in stop_token_ids],
            "transport": transport,
            "chat": (chat or ChatSettings()).to_dict(),
        }
        self._config = config
        self._devices, self._host = devices, host
        self.policy_version = NO_WEIGHTS
        self.num_restarts = 0
        self._process: _Process | None = _Process(self._spec, devices, host)

    @property
    def num_workers(self) -> int:
        """Workers that receive weights."""
        return self._config.tensor_parallel

    @property
    def machine(self) -> str:
        """Where its process runs."""
        return socket.gethostname() if self._host is None else self._host.machine

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.is_alive

    @property
    def is_ready(self) -> bool:
        """Whether it has started (:meth:`wait_ready`) and is alive."""
        return self._process is not None and self._process.is_ready and self._process.is_alive

    def wait_ready(self) -> None:
        """Return when the process has made its engine; raises EngineLostError when it could not."""
        self._open().wait_ready()

    @property
    def pid(self) -> int:
        """Of the process; changes with a restart.  0 if another node has it."""
        return self._open().pid

    def restart(self) -> None:
        """End what is left of the process and start a new one, which holds no weights.

        Raises OSError where the node that has it cannot be reached; the old one stays lost then.
        """
        self._open().kill()
        self.policy_version = NO_WEIGHTS
        self.num_restarts += 1
        self._process = _Process(self._spec, self._devices, self._host)

    def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_tokens: int,
        on_rollout: OnRollout,
        exam: Exam | None = None,
        more: MoreRequests | None = None,
    ) -> None:
        """See :class:`~megatron_rest.rollout.engine.RolloutEngine`."""
        if not requests and more is None:
            return
        with_rows = bool(self._config.environment) or exam is not None  # nobody else reads them there

        def packed_more() -> Packed | Cut | None:
            new = None if more is None else more()
            return new if new is None or new is Cut.NOW else _packed(new, with_rows)

        arrays, values = _packed(requests, with_rows)
        self._sample(
            "run",
            arrays,
            on_rollout=on_rollout,
            more=None if more is None else packed_more,
            **values,
            max_response_tokens=max_response_tokens,
            exam=exam and asdict(exam),
            is_open=more is not None,
        )

    def greedy(self, token_ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``n`` most likely next tokens and their log-probs at temperature 1."""
        result = self._sample("greedy", {"token_ids": np.asarray(token_ids, np.int32)}, n=n)
        return result["tokens"], result["log_probs"]

    def next_tokens(self, token_ids: Sequence[int] | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` likeliest next tokens and their log-probs at temperature 1, likeliest first."""
        result = self._sample("next_tokens", {"token_ids": np.asarray(token_ids, np.int32)}, k=k)
        return result["tokens"], result["log_probs"]

    def prompt_log_probs(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [L]: log-prob of ``token_ids[t]`` given what precedes it; element 0 is 0."""
        return self._sample("prompt_log_probs", {"token_ids": np.asarray(token_ids, np.int32)})["log_probs"]

    # What a weight transfer calls (megatron_rest.weight_sync.sync.SyncTarget) -------------------------------------

    def arguments(self) -> dict[str, Any]:
        """What vLLM's engine was made with."""
        return dict(self._pass_on("arguments"))

    def weight_layout(self) -> list[dict[str, Any]]:
        return list(self._pass_on("weight_layout"))

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        self._pass_on("init_weight_transfer", init_info)

    def start_weight_update(self) -> None:
        """From here until a verified transfer ends the engine holds no usable weights."""
        self.policy_version = NO_WEIGHTS
        self._pass_on("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._pass_on("update_weights", update_info)

    def finish_weight_update(self) -> None:
        self._pass_on("finish_weight_update")

    def received_weights(self) -> list[dict[str, Any]]:
        return list(self._pass_on("received_weights"))

    def reset_prefix_cache(self) -> bool:
        """False also when the engine is gone: all ranks must agree on that, so it is no exception here."""
        try:
            return bool(self._pass_on("reset_prefix_cache"))
        except EngineLostError:
            return False

    def sleep(self) -> None:
        """Its memory is its own: nothing to give back."""

    def wake_up(self) -> None:
        """It never sleeps."""

    def close(self) -> None:
        """Let the process end by itself; end it if it does not.  Idempotent."""
        process, self._process = self._process, None
        self.policy_version = NO_WEIGHTS
        if process is not None:
            process.close()

    def _sample(
        self,
        kind: str,
        arrays: dict[str, np.ndarray],
        on_rollout: OnRollout | None = None,
        more: MorePacked | None = None,
        **values: Any,
    ) -> dict[str, Any]:
        if self.policy_version == NO_WEIGHTS:
            raise EngineStateError("the engine holds no valid weights: transfer the policy's weights before sampling")
        timeout = self._config.engine_timeout_seconds
        return self._open().call(kind, arrays, timeout, on_rollout, more, version=self.policy_version, **values)

    def _pass_on(self, kind: str, *arguments: Any) -> Any:
        timeout = self._config.engine_timeout_seconds
        return self._open().call(kind, {}, timeout, arguments=arguments)["value"]

    def _open(self) -> _Process:
        if self._process is None:
            raise EngineStateError("the engine is closed")
        return self._process


class _Child:
    """A worker process that this one has started, and its end of the connection."""

    def __init__(self, devices: str | None) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self._processes = start_worker(theirs, devices, output=subprocess.PIPE)
        self._output = _Output(self._processes.output)
        self.pid = self._processes.pid
        self.name = f"engine process {self.pid}"

    @property
    def is_alive(self) -> bool:
        return self._processes.poll() is None

    def kill(self) -> None:
        """End the process and all it started, and remove what they may have left."""
        self._processes.end()

    def wait(self, seconds: float) -> None:
        """For an end that was asked for."""
        self._processes.wait(seconds)

    def status(self) -> str:
        code = self._processes.poll()
        if code is None:
            return "its connection broke"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def last_lines(self) -> list[str]:
        return self._output.last_lines()


class _Output:
    """What a process and its children print: passed on to this process's stderr, and its end remembered."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._end = pipe, b""
        self._thread = threading.Thread(target=self._pass_on, name="engine output", daemon=True)
        self._thread.start()

    def last_lines(self) -> list[str]:
        """Call it when the process has ended: waits, shortly, for what is still in the pipe."""
        self._thread.join(_BEHIND_SECONDS)
        lines = self._end.decode(errors="replace").replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip()][-_LOG_LINES:]

    def _pass_on(self) -> None:
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), _LOG_BYTES):
                self._end = (self._end + chunk)[-_LOG_BYTES:]
                with contextlib.suppress(OSError, ValueError):  # nobody reads ours: no reason to stop reading theirs
                    os.write(sys.stderr.fileno(), chunk)


class _Hosted:
    """A worker process on another node; the connection is all that is known of it."""

    pid = 0

    def __init__(self, host: EngineHost, devices: str | None) -> None:
        self.socket = ask_for_engine(host, devices=devices)
        self.name = f"engine on {host.address}:{host.port}"

    @property
    def is_alive(self) -> bool:
        """Its host closes the connection when the process ends."""
        try:
            readable = select.poll()  # select() refuses descriptors above 1023
            readable.register(self.socket, select.POLLIN | select.POLLHUP | select.POLLERR)
            is_readable = bool(readable.poll(0))
            return not is_readable or self.socket.recv(1, socket.MSG_PEEK) != b""
        except (OSError, ValueError):  # broken, or closed here
            return False

    def kill(self) -> None:
        """Its host ends the process when the connection ends."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def wait(self, seconds: float) -> None:
        """Nothing to wait for."""

    def status(self) -> str:
        return "connection lost"

    def last_lines(self) -> list[str]:
        """They are in the log of its own node."""
        return []


class _Process:
    """One process and the connection to it; never started twice."""

    def __init__(self, spec: dict[str, Any], devices: str | None, host: EngineHost | None) -> None:
        self._child = _Child(devices) if host is None else _Hosted(host, devices)
        self._connection = Connection(self._child.socket)
        self.is_ready = False
        self._calling = threading.Lock()
        self._connection.send("spec", **spec)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_alive(self) -> bool:
        return self._child.is_alive

    def wait_ready(self) -> None:
        """Until it has started."""
        with self._calling, self._losses_named("start"):
            self._start()

    def call(
        self,
        kind: str,
        arrays: dict[str, np.ndarray],
        timeout: float,
        on_rollout: OnRollout | None = None,
        more: MorePacked | None = None,
        **values: Any,
    ) -> dict[str, Any]:
        """One call and its result; rollouts that come before it go to ``on_rollout``, and what ``more`` says to it."""
        with self._calling:
            with self._losses_named("start"):
                self._start()
            with self._losses_named(kind):
                self._connection.send(kind, arrays, **values)
                return self._result(kind, timeout, on_rollout, more)

    def _start(self) -> None:
        if not self.is_ready:
            self._result("start", _START_SECONDS)
            self.is_ready = True

    @contextlib.contextmanager
    def _losses_named(self, under_way: str) -> Iterator[None]:
        try:
            yield
        except ConnectionLostError as error:
            self._child.wait(_BEHIND_SECONDS)  # it ends by itself, with a status of its own
            self.kill()
            raise self._lost(f"ended ({self._child.status()}) during {under_way}") from error

    def _result(
        self,
        kind: str,
        timeout: float,
        on_rollout: OnRollout | None = None,
        more: MorePacked | None = None,
    ) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            message = self._receive(kind, timeout, deadline, ask=more is not None)
            if message is not None:
                deadline = time.monotonic() + timeout
                match message["kind"]:
                    case "beat":
                        pass
                    case "rollout":
                        assert on_rollout is not None, "only a run hands rollouts over"
                        on_rollout(message["key"], _rollout(message))
                    case "refused":
                        raise EngineCallError(f"{message['type']}: {message['text']}")
                    case "broken":
                        self._child.wait(_BEHIND_SECONDS)
                        self.kill()
                        raise self._lost(f"failed during {kind} ({message['type']}: {message['text']})")
                    case _:
                        return message
            if more is not None:
                packed = more()
                if packed is None or packed is Cut.NOW:
                    self._connection.send("enough" if packed is None else "cut")
                    more = None
                elif packed[1]["requests"]:
                    self._connection.send("more", packed[0], **packed[1])

    def _receive(self, kind: str, timeout: float, deadline: float, *, ask: bool) -> dict[str, Any] | None:
        """The next message; raises when none has come until ``deadline``, or none can come any more.

        With ``ask`` None when none comes soon.
        """
        try:
            while not self._connection.has_message(min(timeout, _ASK_SECONDS if ask else _LOOK_SECONDS)):
                if not self.is_alive and not self._connection.has_message():
                    raise ConnectionLostError("the process is gone")
                if time.monotonic() > deadline:
                    raise TimeoutError
                if ask:
                    return None
            return self._connection.receive(timeout)
        except TimeoutError:
            self.kill()
            raise self._lost(
                f"gave no sign of life for {timeout:g} s during {kind} and was ended (rollout.engine_timeout_seconds)"
                f"{see(Topic.ENGINES_RESTART)}"
            ) from None

    def _lost(self, how: str) -> EngineLostError:
        quoted = "".join(f"\n    {line}" for line in self._child.last_lines())
        return EngineLostError(f"{self._child.name} {how}" + (f"; its last words:{quoted}" if quoted else ""))

    def kill(self) -> None:
        """End the process and all it started."""
        self._child.kill()

    def close(self) -> None:
        try:
            if self.is_alive:
                self.call("close", {}, _CLOSE_SECONDS)
                self._child.wait(_CLOSE_SECONDS)
        except (EngineLostError, EngineCallError):
            pass
        finally:
            self.kill()
            self._connection.close()


def _packed(requests: Sequence[RolloutRequest], with_rows: bool) -> Packed:
    """Prompts' tokens one behind another, those of what older weights have begun, and the rest of each request;
    ``with_rows`` what their rows of data hold."""
    prompts = [request.prompt for request in requests]
    table = [
        {
            "key": request.key,
            "seed": request.seed,
            "prompt_id": request.prompt.prompt_id,
            "ground_truth": request.prompt.ground_truth,
            "index": request.prompt.index,
            "length": len(request.prompt.token_ids),
            "begun": 0 if request.begun is None else len(request.begun.token_ids),
        }
        for request in requests
    ]
    rows = {p.prompt_id: [p.messages_json, p.tools_json, p.metadata_json] for p in prompts} if with_rows else {}
    begun = [request.begun for request in requests if request.begun is not None]
    arrays = {
        "token_ids": _joined(np.int32, (prompt.token_ids for prompt in prompts)),
        "begun_ids": _joined(np.int32, (rollout.token_ids for rollout in begun)),
        "begun_log_probs": _joined(np.float32, (rollout.log_probs for rollout in begun)),
        "begun_versions": _joined(np.int32, (rollout.versions for rollout in begun)),
    }
    return arrays, {"requests": table, "rows": rows}


def _joined(dtype: type[np.generic], parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


def _rollout(message: dict[str, Any]) -> Rollout:
    return Rollout(
        prompt_id=message["prompt_id"],
        token_ids=message["token_ids"],
        log_probs=message["log_probs"],
        loss_mask=message["loss_mask"],
        stop_reason=StopReason(message["stop_reason"]),
        policy_version=message["policy_version"],
        reward=message["reward"],
        versions=message["versions"],
    )
