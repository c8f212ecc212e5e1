"""An engine that another node starts, both here on one machine and over TCP: asked for with the key, ended, replaced.

1. samples; SIGKILL of its process is noticed and named; a restart gets a new one
2. when its owner closes the connection, its process is gone
3. without the key nothing is started; a host that is gone is not found
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_rest.config import ConfigError, RolloutConfig
from megatron_rest.rollout.engine import EngineLostError
from megatron_rest.rollout.host import EngineHost, announced, ask_for_engine
from megatron_rest.rollout.remote import RemoteEngine
from megatron_rest.rollout.wire import Connection, ConnectionLostError
from megatron_rest.trainer.engine_nodes import hosted_place
from tests.helpers.tiny_model import EOS_ID, build_tiny_model

SECONDS = 180.0


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    folder = tmp_path_factory.mktemp("engines")
    host = subprocess.Popen([sys.executable, "-m", "megatron_rest.rollout.host", str(folder)])
    yield host, folder
    host.kill()
    host.wait()
    assert announced(folder) == [], "what it left does not answer"


@pytest.fixture(scope="module")
def host(process: tuple[subprocess.Popen[bytes], Path]) -> EngineHost:
    deadline = time.monotonic() + SECONDS
    while not (found := announced(process[1])):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found[0]


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    living = [p for p in psutil.Process(process.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in living if "megatron_rest.rollout.worker" in p.cmdline()]


@pytest.mark.extended
def test_an_engine_of_another_node_lives_dies_and_comes_back(
    process: tuple[subprocess.Popen[bytes], Path], host: EngineHost, tmp_path: Path
) -> None:
    build_tiny_model(tmp_path, with_tokenizer=False)
    config = RolloutConfig(kv_cache_bytes=16 << 20, engine_timeout_seconds=SECONDS, max_concurrent=4)
    engine = RemoteEngine(tmp_path, config, seed=0, max_model_len=256, stop_token_ids=[EOS_ID], host=host)
    try:
        engine.policy_version = 1  # random weights will do here
        tokens, _ = engine.greedy([1, 2, 3], 5)
        assert engine.is_alive
        assert engine.machine == host.machine == socket.gethostname(), "the weight transfer asks whether it is here"
        process[0].send_signal(signal.SIGTERM)  # a scheduler's warning: the ranks still need their engines
        [worker] = workers(process[0])
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(EngineLostError, match=f"engine on {host.address}:{host.port} ended"):
            engine.greedy([1, 2, 3], 5)
        assert not engine.is_alive
        engine.restart()
        engine.policy_version = 2
        assert engine.greedy([1, 2, 3], 5)[0].tolist() == tokens.tolist(), "the same random weights, from the seed"
    finally:
        engine.close()
    deadline = time.monotonic() + SECONDS
    while workers(process[0]):
        assert time.monotonic() < deadline, "its owner is gone, and it is still there"
        time.sleep(0.1)


def test_without_the_key_nothing_is_started(process: tuple[subprocess.Popen[bytes], Path], host: EngineHost) -> None:
    stranger = dataclasses.replace(host, key="0" * 32)
    with ask_for_engine(stranger, devices=None) as sock, pytest.raises(ConnectionLostError):
        Connection(sock).receive(SECONDS)
    assert workers(process[0]) == []
    [file] = process[1].glob("*.json")
    assert file.stat().st_mode & 0o077 == 0, "only its owner may read the key"


def test_engines_spread_over_nodes_and_their_gpus() -> None:
    hosts = [EngineHost(address=f"node{i}", port=1, key="", num_gpus=8, machine="m") for i in range(2)]
    config = RolloutConfig(replicas=4, nodes=2, tensor_parallel=4)
    places = [hosted_place(config, hosts, i) for i in range(4)]
    assert [(host.address, gpus) for host, gpus in places] == [
        ("node0", "0,1,2,3"), ("node0", "4,5,6,7"), ("node1", "0,1,2,3"), ("node1", "4,5,6,7"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="want 16 GPUs of node0, which has 8"):
        hosted_place(dataclasses.replace(config, tensor_parallel=8), hosts, 1)
