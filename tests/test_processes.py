"""Processes that run code of the user's end with their owner, whatever they are at, and with all they have started."""

from __future__ import annotations

import json
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
