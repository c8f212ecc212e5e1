"""Processes end with who started them, whatever they are at, and with all they have started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rest.processes import start_of

WORKER = """
import json, subprocess, sys, time
from megatron_rest.processes import serve_as_worker

requests, replies = serve_as_worker()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
print("not an answer", flush=True)
assert sys.stdin.read() == "", "nothing of the owner's"
replies.write(requests.readline().upper() + json.dumps([child.pid]).encode() + b"\\n")
replies.flush()
while True:
    time.sleep(1)
"""
OWNER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from megatron_rest.processes import end_worker, start_worker

worker = start_worker("hanging_worker")
worker.stdin.write(b"hello\\n")
worker.stdin.flush()
assert worker.stdout.readline() == b"HELLO\\n"
print(json.dumps([worker.pid, *json.loads(worker.stdout.readline())]), flush=True)
if sys.stdin.readline() == "end\\n":
    end_worker(worker)
    worker.wait()
sys.stdin.readline()
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("ending", ["owner killed", "asked to"])
def test_a_worker_that_hangs_ends_with_its_owner_and_its_children(tmp_path: Path, ending: str) -> None:
    (tmp_path / "hanging_worker.py").write_text(WORKER)
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin is not None and owner.stdout is not None
        pids = json.loads(owner.stdout.readline())
        assert all(start_of(pid) for pid in pids)
        if ending == "asked to":
            owner.stdin.write("end\n")
            owner.stdin.flush()
            until(lambda: not any(start_of(pid) for pid in pids))
        owner.kill()
    until(lambda: not any(start_of(pid) for pid in pids))


LAUNCHER = """
import os, subprocess, sys

rank = "import time; from megatron_rest.trainer.entry import _go_with_the_launcher as follow; follow(); "
rank += "print('up', flush=True); time.sleep(3600)"
env = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
names = [env | {"TORCHELASTIC_RUN_ID": "none"}, env]
ranks = [subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, env=each) for each in names]
assert all(rank.stdout.readline() == b"up\\n" for rank in ranks)
print(*(rank.pid for rank in ranks), flush=True)
sys.stdin.readline()
"""


def test_a_rank_ends_when_its_launcher_was_killed_and_one_without_lives_on() -> None:
    command = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        launched, alone = map(int, launcher.stdout.readline().split())
        launcher.kill()
    try:
        until(lambda: not start_of(launched))
        assert start_of(alone)
    finally:
        os.kill(alone, signal.SIGKILL)
