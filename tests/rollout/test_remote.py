"""An engine in a process of its own: its answers, hanging, and what becomes of orphans.

1. rollouts are handed over one by one; a refused call is an error of the call
2. SIGSTOP in the middle: what was handed over stays, the process is ended after the time limit, EngineLostError
3. SIGKILL while the ranks connect to it: the transfer is given up at once
4. a process that cannot start is noticed at once, with what it said
5. a process whose owner is killed goes, too
(SIGKILL and restart, with the trainer around it: tests/trainer/test_run.py.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from megatron_rest.config import RolloutConfig, WeightSyncConfig
from megatron_rest.model_map import ModelShape, parameter_map
from megatron_rest.processes import mapped_segments, start_of
from megatron_rest.rollout.engine import (
    NO_WEIGHTS,
    Cut,
    EngineLostError,
    EngineStateError,
    Exam,
    RolloutRequest,
    make_requests,
)
from megatron_rest.rollout.remote import EngineCallError, RemoteEngine
from megatron_rest.rollout.wire import Connection, ConnectionLostError
from megatron_rest.types import PromptSample, Rollout
from megatron_rest.weight_sync.layouts import TrainingLayout, training_shards
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weight_sync.sync import WeightSync
from tests.helpers.tiny_model import EOS_ID, build_tiny_model, read_config
from tests.weight_sync.test_plan import shards_of

HANG_SECONDS = 10.0


def gone(pid: int, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.2)
    return False


@pytest.mark.slow
def test_engine_process_answers_hangs_and_is_ended(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, with_tokenizer=False)
    config = RolloutConfig(kv_cache_bytes=16 << 20, engine_timeout_seconds=300, max_concurrent=4)
    engine = RemoteEngine(tmp_path, config, seed=0, max_model_len=256, stop_token_ids=[EOS_ID])
    try:
        prompts = [
            PromptSample(prompt_id=f"p{i}", token_ids=np.arange(i, i + 20, dtype=np.int32), ground_truth="g")
            for i in range(6)
        ]
        requests = make_requests(prompts, rollouts_per_prompt=2, seed=1)
        with pytest.raises(EngineStateError, match="no valid weights"):
            engine.greedy([1, 2], 2)
        engine.policy_version = 3  # random weights will do here
        with pytest.raises(EngineCallError, match=r"RefusedRequestError: .* holds token id 9999"):
            engine.greedy([1, 9999], 2)
        whole: dict[int, Rollout] = {}
        engine.run(requests, max_response_tokens=200, on_rollout=whole.__setitem__)
        assert sorted(whole) == list(range(12)) and {r.policy_version for r in whole.values()} == {3}
        exam: dict[int, Rollout] = {}
        engine.run(requests[::2], max_response_tokens=20, on_rollout=exam.__setitem__, exam=Exam())
        for request in requests[::2]:
            answer = exam[request.key].token_ids.tolist()
            assert answer == engine.greedy(request.prompt.token_ids, 20)[0][: len(answer)].tolist()
        fed: dict[int, Rollout] = {}
        later = [requests[4:9], requests[9:]]

        def more() -> list[Any] | None:
            """Asked for as the first ones come."""
            return later.pop(0) if fed and later else None if not later else []

        engine.run(requests[:4], max_response_tokens=200, on_rollout=fed.__setitem__, more=more)
        assert {k: r.token_ids.tolist() for k, r in fed.items()} == {k: r.token_ids.tolist() for k, r in whole.items()}
        _cut_and_go_on(engine, requests, whole)
        ids, likely = engine.next_tokens([1, 2, 3], 4)
        tokens, log_probs = engine.greedy([1, 2, 3], 5)
        assert ids[0] == tokens[0] and likely[0] == log_probs[0] and (np.diff(likely) <= 0).all() and len(ids) == 4
        scored = engine.prompt_log_probs([1, 2, 3, *tokens])
        np.testing.assert_allclose(scored[-5:], log_probs, atol=1e-5)

        handed: dict[int, Rollout] = {}
        pid = engine.pid

        def take(key: int, rollout: Rollout) -> None:
            handed[key] = rollout
            os.kill(pid, signal.SIGSTOP)

        engine._config = RolloutConfig(engine_timeout_seconds=HANG_SECONDS)
        with pytest.raises(EngineLostError, match=f"engine process {pid} gave no sign of life for 10 s during run"):
            engine.run(requests, max_response_tokens=200, on_rollout=take)
        assert gone(pid) and not engine.is_alive
        assert 1 <= len(handed) < 12
        assert all(whole[key].token_ids.tolist() == r.token_ids.tolist() for key, r in handed.items())
        with pytest.raises(EngineLostError, match=f"engine process {pid} ended"):
            engine.start_weight_update()
        assert engine.policy_version == NO_WEIGHTS
        assert engine.reset_prefix_cache() is False, "no exception: the ranks agree on it"
        engine.restart()
        _die_while_connecting(engine, tmp_path)
    finally:
        engine.close()
        engine.close()


def _cut_and_go_on(engine: RemoteEngine, requests: list[RolloutRequest], whole: dict[int, Rollout]) -> None:
    """Cut as soon as the first has ended; what was begun travels there and back."""
    parts: dict[int, Rollout] = {}
    engine.run(requests, max_response_tokens=200, on_rollout=parts.__setitem__, more=lambda: Cut.NOW if parts else ())
    cut = {key: rollout for key, rollout in parts.items() if not rollout.is_whole}
    assert cut
    for key, rollout in parts.items():
        assert rollout.token_ids.tolist() == whole[key].token_ids[: len(rollout.token_ids)].tolist()
    engine.policy_version = 4
    ended: dict[int, Rollout] = {}
    again = [replace(request, begun=cut[request.key]) for request in requests if request.key in cut]
    engine.run(again, max_response_tokens=200, on_rollout=ended.__setitem__)
    for key, rollout in ended.items():
        count = len(cut[key].token_ids)
        assert rollout.is_whole and rollout.token_ids[:count].tolist() == cut[key].token_ids.tolist()
        assert rollout.log_probs[:count].tolist() == cut[key].log_probs.tolist()
        assert rollout.versions.tolist() == [3] * count + [4] * (len(rollout.token_ids) - count)
    engine.policy_version = 3


def _die_while_connecting(engine: RemoteEngine, folder: Path) -> None:
    """The ranks stand at the meeting point already; nobody waits there for the minutes that a transfer may take."""
    shape = ModelShape.from_hf_config(read_config(folder))
    shards = shards_of(shape, load_file(folder / "model.safetensors"), training_shards(shape, TrainingLayout())[0])
    source = MegatronWeightSource(lambda: shards, parameter_map(shape), shape)
    join = engine.init_weight_transfer

    def dies(info: dict[str, Any]) -> None:
        assert info["timeout_seconds"] >= 600
        os.kill(engine.pid, signal.SIGKILL)
        join(info)

    engine.init_weight_transfer = dies  # type: ignore[method-assign]
    with pytest.raises(ConnectionError, match=r"did not meet: engine process \d+ ended \(signal SIGKILL\)"):
        WeightSync(engine, source, WeightSyncConfig(transport="gloo"))
    assert not engine.is_alive


def test_process_that_cannot_start_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = RemoteEngine(tmp_path, RolloutConfig(), seed=0, max_model_len=64)
    words = (
        r"ended \(exit status 1\) during start; its last words:\n(.*\n)*.*is not an HF model folder: it has no config"
    )
    with pytest.raises(EngineLostError, match=words):
        engine.weight_layout()
    assert "is not an HF model folder" in capfd.readouterr().err, "and it is in the owner's own log"


def test_process_goes_with_its_owner(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, with_tokenizer=False)
    code = (
        "import sys, time\n"
        "from megatron_rest.config import RolloutConfig\n"
        "from megatron_rest.rollout.remote import RemoteEngine\n"
        f"engine = RemoteEngine({str(tmp_path)!r}, RolloutConfig(kv_cache_bytes=16 << 20), seed=0, max_model_len=64)\n"
        "print(engine.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert psutil.pid_exists(pid)
        owner.kill()
        owner.wait()
    assert gone(pid)


@pytest.mark.extended
def test_a_killed_engine_of_two_workers_leaves_nothing(tmp_path: Path) -> None:
    """Its workers share memory by files that only vLLM's own orderly end would remove."""
    build_tiny_model(tmp_path, with_tokenizer=False)
    config = RolloutConfig(kv_cache_bytes=16 << 20, tensor_parallel=2)
    engine = RemoteEngine(tmp_path, config, seed=0, max_model_len=64)
    folder = engine._open()._child._processes._folder
    try:
        engine.policy_version = 1
        engine.greedy([1, 2], 2)
        processes = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
        shared = {path for process in processes for path in mapped_segments(process.pid)}
        assert shared and len(processes) >= 4, "the engine's core, two workers, and what they share"
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineLostError, match="signal SIGKILL"):
            engine.greedy([1, 2], 2)
        assert not any(Path(path).exists() for path in shared) and not folder.exists()
        assert not any(start_of(process.pid) for process in processes)
    finally:
        engine.close()


def test_messages_carry_arrays_and_ends_are_noticed() -> None:
    import socket

    ours, theirs = (Connection(s) for s in socket.socketpair())
    arrays = {"a": np.arange(5, dtype=np.int32), "b": np.zeros(0, np.float32), "c": np.array([True, False])}
    ours.send("x", arrays, value={"n": 2**62, "text": "ü"})
    got = theirs.receive(timeout=60)
    assert got["kind"] == "x" and got["value"] == {"n": 2**62, "text": "ü"}
    assert all(np.array_equal(got[k], v) and got[k].dtype == v.dtype for k, v in arrays.items())
    with pytest.raises(TimeoutError):
        theirs.receive(timeout=0.05)
    ours._socket.sendall(b"\0\0")  # half a header, then the end
    ours.close()
    with pytest.raises(ConnectionLostError):
        theirs.receive(timeout=60)
    with pytest.raises(ConnectionLostError):
        for _ in range(3):
            theirs.send("y")
