"""Run many ``nemo-run`` commands in one process start: imports once, then a fork for each (JSON in, JSON out)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path


def _child(arguments: list[str], env: dict[str, str], out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.update(env)
    status = 0
    try:
        from launch.cli import main

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


def run(arguments: list[str], env: dict[str, str]) -> dict[str, object]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _child(arguments, env, out.fileno(), err.fileno())
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return {
            "returncode": os.waitstatus_to_exitcode(status),
            "stdout": out.read().decode(),
            "stderr": err.read().decode(),
        }


if __name__ == "__main__":
    import launch.cli
    import launch.cluster  # noqa: F401

    assert "torch" not in sys.modules
    cases = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({name: run(case["arguments"], case["env"]) for name, case in cases.items()}))
