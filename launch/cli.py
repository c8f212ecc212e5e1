"""Console script ``nemo-run``: run a launch file, hand everything else to NeMo-Run's own command line.

    nemo-run launch/rest_70b.py [--dryrun] [--yes] [key=value ...]
    nemo-run experiment status ID

nemo-run 0.11.1 ships ``nemo`` and ``nemorun`` only, and neither runs a file.  ``python launch/rest_70b.py ...`` is the
same thing as ``nemo-run launch/rest_70b.py ...``: both end in :func:`run_recipe`.  What is repaired on the way:

* exit status: NeMo-Run calls typer with ``standalone_mode=False`` and drops the status, so bad arguments ended with 0;
* ``torchrun`` is found although the virtual environment is not activated;
* ``section.key=value`` overrides of the configuration tree never meet NeMo-Run's parser, which evaluates what looks
  like Python (``lambda``, ``x if y else z``) and splits at signs;
* ``run.executor.X=...`` without ``run.executor=NAME`` is silently ignored upstream: the recipe's executor is filled in.
"""

import difflib
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.compat import ensure_nemo_run_importable
from megatron_rest.config import ConfigError, load

__all__ = ["main", "run_recipe"]

_USAGE = """usage: nemo-run LAUNCH_FILE.py [--dryrun] [--yes] [key=value ...]
       nemo-run experiment|devspace|... (NeMo-Run's own commands)"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        ensure_nemo_run_importable()
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: pip install -e '.[launch]' (or make setup)")
    # executed by NeMo-Run from the current folder or any parent: a surprise from somebody else's directory
    os.environ.setdefault("INCLUDE_WORKSPACE_FILE", "false")
    bin_dir = str(Path(sys.executable).parent)
    if bin_dir not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = bin_dir + os.pathsep + os.environ.get("PATH", "")
    if arguments and arguments[0].endswith(".py"):
        _run_file(Path(arguments[0]), arguments[1:])
    else:
        _nemo_run(arguments)


def _run_file(path: Path, arguments: list[str]) -> None:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("rest_*.py")) if path.parent.is_dir() else []
        known = f"; {path.parent} has {', '.join(near)}" if near else ""
        _fail(f"no launch file {path}{known}\n{_USAGE}")
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    runpy.run_path(str(path), run_name="__main__")


def _nemo_run(arguments: list[str]) -> None:
    sys.argv = ["nemo-run", *arguments]
    from nemo_run.__main__ import app

    app()


def run_recipe(recipe: Callable[..., Any], executor: str) -> None:
    """What a launch file's ``__main__`` calls; ``executor`` names the factory if ``run.executor=`` does not."""
    import nemo_run as run

    import launch.trainjob  # noqa: F401  registers, with launch.executors, the factories that run.executor= names
    from launch.recipe import GIVEN

    names = [name for name in inspect.signature(recipe).parameters if name != "ctx"]
    try:
        ours, theirs = split_arguments(sys.argv[1:], names)
    except ValueError as error:
        _fail(str(error))
    GIVEN.take(ours)
    if not any(argument.startswith("run.executor=") for argument in theirs):
        theirs.append(f"run.executor={executor}")
    if "--dryrun" in theirs and "--yes" not in theirs:
        theirs.append("--yes")  # nothing to confirm
    if "--yes" in theirs:
        run.dryrun_fn = lambda *args, **kwargs: None  # the table to look at before answering the question
    elif not sys.stdin.isatty():
        _fail("no terminal to confirm on: say --yes to start, or --dryrun to look")
    sys.argv = [sys.argv[0], *theirs]
    _repair_exit_status()
    run.cli.main(recipe)


def split_arguments(arguments: Sequence[str], parameters: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the configuration tree, and what NeMo-Run's parser shall see (flags, parameters, ``run.*``)."""
    ours: list[str] = []
    theirs: list[str] = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if argument.startswith("-") or key.startswith(("run.", "run[")) or key.rstrip("+-*/|&") in parameters:
            theirs.append(argument)
        elif equals and (key in ("config", "preprocess") or "." in key):
            ours.append(argument)
        else:
            raise ValueError(_unknown(argument, key, parameters))
    return ours, theirs


def _unknown(argument: str, key: str, parameters: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, [*parameters, "config", "preprocess"], n=1)
    if near:
        return f"unknown argument {argument!r}: did you mean {near[0]}=...?"
    try:
        load(None, [argument])
    except ConfigError as error:  # names the section where the field lives
        return str(error)
    return f"unknown argument {argument!r}"


def _repair_exit_status() -> None:
    """NeMo-Run's entrypoints end with the status that typer worked out."""
    from nemo_run.cli import api

    def strict_main(self: Any, cmd_defaults: dict[str, Any] | None = None) -> None:
        app = api.typer.Typer(help=self.help_str, pretty_exceptions_enable=False)
        self._add_command(app, is_main=True, cmd_defaults=cmd_defaults)
        status = app(standalone_mode=False)
        if isinstance(status, int) and status:
            raise SystemExit(status)

    api.Entrypoint.main = strict_main
    api.print = lambda *args, **kwargs: None  # "Configuring global options", on every start


def _fail(message: str) -> None:
    raise SystemExit(f"nemo-run: {message}")


if __name__ == "__main__":
    main()
