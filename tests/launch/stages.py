"""Runs stages of tests.launch.job: ``python -m tests.launch.stages FOLDER kind...`` (a program, as a recipe is one)."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.compat import ensure_nemo_run_importable

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

from launch import processes  # noqa: E402
from launch.executors import CPU_ENV  # noqa: E402
from launch.local import run_stages  # noqa: E402
from launch.recipe import Stage  # noqa: E402


def main() -> None:
    folder, kind, ranks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    processes.stop_tree.__kwdefaults__["grace"] = 2.0
    (folder / "made").mkdir(exist_ok=True)
    stages = [
        Stage(name="first", module="tests.launch.job", arguments=(kind, *sys.argv[4:]), ranks=ranks),
        Stage(name="second", module="tests.launch.job", arguments=("say",)),
    ]
    run_stages("test", stages, run.LocalExecutor(env_vars=dict(CPU_ENV)), folder / "logs")


if __name__ == "__main__":
    main()
