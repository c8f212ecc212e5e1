"""Environments in processes of their own, with the rollout loop around them: state, faults, what is left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_rest.config import RolloutConfig
from megatron_rest.errors import RunError
from megatron_rest.processes import start_of
from megatron_rest.rollout.engine import make_requests
from megatron_rest.rollout.environments.base import Answer, Message
from megatron_rest.rollout.environments.calls import Call, ParsedCalls
from megatron_rest.rollout.environments.workers import EnvironmentWorkers
from megatron_rest.rollout.rollouter import Conversation, run_rollouts
from megatron_rest.types import PromptSample, Rollout, StopReason
from tests.rollout.test_rollouter import LIMIT, ScriptedSampler, Translator

CODE = """
import json, os, subprocess, sys, time
from megatron_rest.rollout.environments.base import Message, Observation


class Unprintable:
    def __str__(self):
        raise RuntimeError("no")


class Counting:
    def __init__(self, prompt, *, until):
        if prompt.ground_truth == "refuse":
            raise ValueError("no such task")
        self.prompt, self.until, self.seen = prompt, until, []

    async def reset(self):
        self.seen.append(self.prompt.metadata["start"])

    def step(self, answer):
        print("said while it worked")  # not to be taken for an answer
        match self.prompt.ground_truth:
            case "hang":
                while True:
                    pass
            case "die":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
                open(self.prompt.metadata["closed"] + ".child", "w").write(str(child.pid))
                os._exit(9)
            case "read":
                return Observation(messages=(Message(role="tool", content=repr(os.read(0, 9))),))
            case "slow":
                time.sleep(2.0)
            case "unprintable":
                raise ValueError(Unprintable())
            case "none":
                return None
        self.seen.append([answer.text, answer.turn, [[c.name, c.arguments] for c in answer.calls.calls]])
        if len(self.seen) > self.until:
            return Observation(done=True)
        return Observation(messages=(Message(role="tool", content=json.dumps([os.getpid(), self.seen])),))

    def reward(self):
        return 0.5 * len(self.seen)

    def close(self):
        open(self.prompt.metadata["closed"], "a").write("x")
"""


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EnvironmentWorkers]:
    (tmp_path / "counting_environments.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = EnvironmentWorkers("counting_environments:Counting", {"until": 2}, num_workers=1)
    yield made
    made.close()
    assert all(worker._process.wait(60) is not None for worker in made._workers)


def prompt(kind: str, folder: Path, index: int = 0) -> PromptSample:
    return PromptSample(
        prompt_id=f"p{index}",
        token_ids=np.arange(5, dtype=np.int32),
        ground_truth=kind,
        index=index,
        metadata_json=json.dumps({"start": index, "closed": str(folder / f"closed{index}")}),
    )


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_environments_in_a_process(tmp_path: Path, workers: EnvironmentWorkers) -> None:
    """State, asynchronous methods, calls with arguments; two at once; a failing one; a lost process; a hanging call."""
    one, two = workers(prompt("", tmp_path, 1)), workers(prompt("", tmp_path, 2))
    one.reset()
    two.reset()
    answer = Answer(text="a\ud800", calls=ParsedCalls((Call("f", {"x": [1, None]}),), ("odd",)), turn=0)
    observation = one.step(answer)
    assert isinstance(observation.messages[0], Message)  # type: ignore[union-attr]
    pid, seen = json.loads(observation.messages[0].content)  # type: ignore[union-attr]
    assert pid != os.getpid() and seen == [1, ["a\ud800", 0, [["f", {"x": [1, None]}]]]]
    assert one.step(answer).done and one.reward() == 1.5 and two.reward() == 0.5  # type: ignore[union-attr]
    one.close()
    assert (tmp_path / "closed1").read_text() == "x" and not (tmp_path / "closed2").exists()
    refusing = workers(prompt("refuse", tmp_path))
    with pytest.raises(RuntimeError, match="ValueError: no such task"):
        refusing.reset()
    refusing.close()
    bad = workers(prompt("unprintable", tmp_path))
    bad.reset()
    with pytest.raises(RuntimeError, match=r"ValueError: its text cannot be shown \(RuntimeError\)"):
        bad.step(answer)
    bad.close()
    reading = workers(prompt("read", tmp_path))
    reading.reset()
    assert reading.step(answer).messages[0].content == "b''", "the requests are not there for it to read"  # type: ignore[union-attr]
    reading.close()
    refused = workers(prompt("none", tmp_path))
    refused.reset()
    with pytest.raises(RuntimeError, match=r"step\(\) returned None, expected an Observation"):
        refused.step(answer)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ConnectionError, match="the environments' process ended"):
        two.step(answer)
    two.close()

    kinds = ["", "hang", "die", "", "slow"]
    sampler = ScriptedSampler({i: [1, 1, 1] for i in range(5)})
    done: dict[int, Rollout] = {}

    def roll(*indices: int, seconds: float = 120.0) -> list[StopReason]:
        conversation = Conversation(factory=workers, translator=Translator(), max_turns=4, timeout_seconds=seconds)
        prompts = [prompt(kinds[i], tmp_path, 10 + i) for i in range(5)]
        requests = [make_requests(prompts, rollouts_per_prompt=1, seed=3)[i] for i in indices]
        run_rollouts(
            sampler, requests, max_response_tokens=LIMIT, on_rollout=done.__setitem__, conversation=conversation
        )
        return [done[i].stop_reason for i in indices]

    assert roll(0) == [StopReason.EOS] and done[0].reward == 1.5
    [worker] = workers._workers
    assert worker._process.pid != pid, "a new process in the place of the killed one"
    wait_until(lambda: worker.num_environments == 0)
    assert roll(1, seconds=5.0) == [StopReason.TOOL_TIMEOUT]
    wait_until(lambda: not psutil.pid_exists(worker._process.pid) or worker._process.poll() is not None)
    assert roll(2) == [StopReason.TOOL_FAILED]
    child = int((tmp_path / "closed12.child").read_text())
    wait_until(lambda: not start_of(child))
    assert roll(3) == [StopReason.EOS], "and the next one has another process again"
    wait_until(lambda: (tmp_path / "closed13").exists())
    assert roll(4, seconds=0.5) == [StopReason.TOOL_TIMEOUT]
    wait_until(lambda: (tmp_path / "closed14").exists())  # the call came back late; it is closed behind it
    assert all(worker.is_open for worker in workers._workers), "and the process goes on"


def test_what_a_process_imports_is_no_rollouts_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first environment; and while a lost process is replaced, the others take what it would have."""
    gate = tmp_path / "gate"
    gate.touch()
    waits = f"import os, time\nwhile not os.path.exists({str(gate)!r}):\n    time.sleep(0.01)\n"
    (tmp_path / "heavy_environments.py").write_text(waits + CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    workers = EnvironmentWorkers("heavy_environments:Counting", {"until": 2}, num_workers=2)
    try:
        assert all(worker.is_ready for worker in workers._workers)
        gate.unlink()
        os.kill(workers._workers[0]._process.pid, signal.SIGKILL)
        wait_until(lambda: not workers._workers[0].is_open)
        for i in range(3):
            workers(prompt("", tmp_path, i)).reset()
        successor, other = workers._workers
        assert (successor.num_environments, other.num_environments) == (0, 3)
        gate.touch()
        wait_until(lambda: successor.is_ready)
        workers(prompt("", tmp_path, 3)).reset()
        assert (successor.num_environments, other.num_environments) == (1, 3)
    finally:
        workers.close()


def test_an_environment_that_cannot_be_imported_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_environments.py").write_text(CODE + "\nraise OSError('no simulator here')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RunError, match=r"rollout.environment_workers: a process .* did not start: .*no simulator here"):
        EnvironmentWorkers("broken_environments:Counting", {}, num_workers=2)


def test_the_configuration_leads_there() -> None:
    from megatron_rest.rollout import conversations

    config = RolloutConfig(environment="bfcl", environment_workers=2)
    factory = conversations._factory(config)
    assert isinstance(factory, EnvironmentWorkers) and len(factory._workers) == 2
    factory.close()
    assert not isinstance(conversations._factory(RolloutConfig(environment="bfcl")), EnvironmentWorkers)
