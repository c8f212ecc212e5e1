"""Settings before torch: made once, never over what is set, refused when too late."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_rest.rollout.process import cpu_share

PROBE = """
import os, sys
{before}
from megatron_rest.rollout.process import prepare_process, ProcessNotPreparedError
assert {imported!r} or not {{"torch", "vllm"}} & set(sys.modules), "importing the package pulls in torch"
try:
    prepare_process(threads=2)
except ProcessNotPreparedError as e:
    print("refused:", e)
else:
    print(os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"], os.environ["VLLM_CPU_OMP_THREADS_BIND"])
"""


def probe(before: str = "", **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "VLLM_", "TORCHDYNAMO"))}
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(before=before, imported=bool(before))],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sets_what_is_unset_and_keeps_what_is_set() -> None:
    assert probe() == "PASSIVE 2 nobind"
    assert probe(OMP_NUM_THREADS="3", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE 3 nobind"


def test_refuses_when_torch_is_there_already() -> None:
    message = probe("sys.modules['torch'] = sys")
    assert message.startswith("refused: torch was imported before prepare_process() could set OMP_WAIT_POLICY")
    assert "OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2" in message
    assert probe("sys.modules['torch'] = sys", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE") == "PASSIVE 1 nobind"


def test_package_imports_nothing_heavy() -> None:
    code = "import sys, megatron_rest.rollout, megatron_rest.rollout.vllm_engine; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cpu_share() == 8
    for ranks, threads in ((1, 8), (3, 2), (8, 1), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert cpu_share() == threads
