"""The processes that other tests borrow: imports are there, nothing else is, and a failure of one is seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers import forked
from tests.helpers.distributed import run_distributed


def _leave_traces(rank: int, world_size: int) -> tuple[int, bool, str | None, torch.dtype, int, list[str]]:
    from megatron.core import parallel_state

    found = (
        os.getpid(),
        parallel_state.model_parallel_is_initialized(),
        os.environ.get("REST_TRACE"),
        torch.get_default_dtype(),
        threading.active_count(),
        [name for name in ("megatron.core", "vllm.v1.engine.core") if name not in sys.modules],
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    os.environ["REST_TRACE"] = "left"
    torch.set_default_dtype(torch.float64)
    return found


def test_every_rank_is_fresh_and_has_the_imports() -> None:
    first, second = (run_distributed(_leave_traces, 2) for _ in range(2))
    for _, *state in first + second:
        assert state == [False, None, torch.float32, 1, []]
    assert len({pid for pid, *_ in first + second}) == 4


def _environment(rank: int, world_size: int) -> str | None:
    return os.environ.get("REST_TRACE")


def test_ranks_see_the_environment_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    run_distributed(_environment, 1)  # the server is there, and knows nothing of what comes
    monkeypatch.setenv("REST_TRACE", "here")
    assert run_distributed(_environment, 2) == ["here", "here"]


def _fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("words of rank 1")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 has the time to fail, too, and to say so
    dist.barrier()


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


@pytest.mark.timeout(60)  # less than the collective's own limit: nobody waits for what cannot come
def test_a_rank_that_fails_or_dies_ends_the_others() -> None:
    with pytest.raises(AssertionError, match="words of rank 1"):
        run_distributed(_fail, 2)
    with pytest.raises(AssertionError):
        run_distributed(_die, 2)


PROGRAM = """
import os, sys
print("rank", os.environ.get("RANK"), sys.argv[1:], __name__)
if os.environ.get("RANK") == "1":
    sys.exit("what went wrong")
if "raise" in sys.argv:
    raise ValueError("a traceback")
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "some_program.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize("arguments", [["a", "b"], ["raise"]])
def test_a_module_runs_as_the_interpreter_runs_it(program: Path, arguments: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(program)}
    ours = forked.run_module("some_program", *arguments, cwd=program, env=env)
    theirs = subprocess.run(
        [sys.executable, "-m", "some_program", *arguments],
        cwd=program, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_ranks_of_a_module_have_torchruns_variables_and_the_first_failure_counts(program: Path) -> None:
    done = forked.run_module("some_program", ranks=2, cwd=program)
    assert done.returncode == 1
    assert "rank 1 [] __main__" in done.stdout and "what went wrong" in done.stderr
