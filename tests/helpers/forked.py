"""Processes for tests, forked from a server that has torch, Megatron-Core and vLLM imported.

    process = start(function, argument)      # function(argument) in a process of its own
    done = run_module("megatron_rest.trainer", "trainer.steps=1", ranks=4)   # as torchrun ... -m megatron_rest.trainer

What runs is what ``python -m`` runs, in a process that nothing else has used; only the ten seconds of imports are not
repeated.  Tests of how processes are started (torchrun, signals, engines that die) start real ones instead.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_rest.rollout.process import prepare_process

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = "tests.helpers.preload"

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([PRELOAD])


def start(function: Callable[..., None], *args: Any, env: Mapping[str, str] | None = None) -> BaseProcess:
    """Start ``function(*args)`` (importable, picklable) with this process's environment, or with ``env``."""
    process = CONTEXT.Process(target=_enter, args=(dict(os.environ if env is None else env), function, args))
    process.start()
    return process


def _enter(env: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    preload = sys.modules.get(PRELOAD)
    if preload is None or os.getppid() != preload.SERVER:
        raise RuntimeError(f"the fork server could not import {PRELOAD}: python -c 'import {PRELOAD}' says why")
    preload.end_with_parent()
    os.environ.clear()
    os.environ.update(env)
    prepare_process(allow_late=True)  # the server has: its settings are in force, whatever the test's environment says
    function(*args)


def run_module(
    module: str,
    *arguments: str,
    ranks: int = 0,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 500.0,
) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments``; with ``ranks`` as many of them, with the variables that torchrun sets.

    The first rank that fails ends the others, and its status is the result's; all write to the same two files.
    """
    env = dict(os.environ if env is None else env)
    places: list[dict[str, str]] = [{}]
    if ranks:
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "none"}
        places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        out.touch()
        err.touch()
        processes = [
            start(_run_module, module, arguments, str(cwd), str(out), str(err), env={**env, **place})
            for place in places
        ]
        status = wait(processes, timeout)
        if status is None:
            raise subprocess.TimeoutExpired([module, *arguments], timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess([module, *arguments], status, out.read_text(), err.read_text())


def wait(processes: list[BaseProcess], timeout: float) -> int | None:
    """The first status that is not 0, else 0; None after ``timeout`` seconds.  Nothing of them is left."""
    deadline = time.monotonic() + timeout
    try:
        left = {process.sentinel: process for process in processes}
        while left:
            ended = multiprocessing.connection.wait(list(left), max(0.0, deadline - time.monotonic()))
            if not ended:
                return None
            for sentinel in ended:
                process = left.pop(sentinel)
                process.join()
                if process.exitcode:
                    return process.exitcode
        return 0
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5.0)
            process.kill()
            process.join()


def _run_module(module: str, arguments: tuple[str, ...], cwd: str, out: str, err: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(cwd)
    sys.path.insert(0, cwd)  # as -m does
    sys.argv = [module, *arguments]
    status: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code
    except BaseException:  # noqa: BLE001  reported as the interpreter would
        traceback.print_exc()
        status = 1
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
