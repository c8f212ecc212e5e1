"""``nemo-run`` commands without the imports of each: a server that has them is forked for every command.

    server = Server(environment)
    done = server.run(["launch/rest_8b.py", "--dryrun"], env=environment, cwd=folder)

A command starts in milliseconds instead of five seconds; all else is as in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

SECONDS = 500  # of a command, then it is ended


class Server:
    """One process without torch; one command at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, arguments: list[str], *, env: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """``nemo-run arguments`` with exactly this environment."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([arguments, dict(env), str(cwd)]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the server is gone: its last words are on stderr"
        return subprocess.CompletedProcess(arguments, *json.loads(line))

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    import launch.cli
    import launch.cluster  # noqa: F401

    assert "torch" not in sys.modules
    for line in sys.stdin:
        print(json.dumps(_run(*json.loads(line))), flush=True)


def _run(arguments: list[str], env: dict[str, str], cwd: str) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _child(arguments, env, cwd, out.fileno(), err.fileno())
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read().decode(), err.read().decode()


def _child(arguments: list[str], env: dict[str, str], cwd: str, out: int, err: int) -> NoReturn:
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    status = 0
    try:
        from nemo_run.config import set_nemorun_home

        from launch.cli import main

        set_nemorun_home(env["NEMORUN_HOME"])  # which NeMo-Run reads when it is imported
        main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1 if error.code else 0
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  reported as the interpreter would
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
