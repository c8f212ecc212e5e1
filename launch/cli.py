"""Console script ``nemo-run``: run a launch file, hand everything else to NeMo-Run's own command line.

    nemo-run launch/rest_70b.py [--dryrun] [--yes] [key=value ...]
    nemo-run rest_70b ...                                          the recipe of that name that is installed
    nemo-run experiment status ID

nemo-run 0.11.1 ships ``nemo`` and ``nemorun`` only, and neither runs a file.  ``python launch/rest_70b.py ...`` is the
same thing as ``nemo-run launch/rest_70b.py ...``: both end in :func:`run_recipe`.  What is repaired on the way:

* exit status: NeMo-Run calls typer with ``standalone_mode=False`` and drops the status, so bad arguments ended with 0;
* ``torchrun`` is found although the virtual environment is not activated;
* ``section.key=value`` overrides of the configuration tree never meet NeMo-Run's parser, which evaluates what looks
  like Python (``lambda``, ``x if y else z``) and splits at signs;
* ``run.executor.X=...`` without ``run.executor=NAME`` is silently ignored upstream: the recipe's executor is filled in.
"""

import ast
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.compat import ensure_nemo_run_importable
from megatron_rest.config import ConfigError, RestConfig, load
from megatron_rest.help_topics import Topic, see
from megatron_rest.scripts import recipe_file

__all__ = ["main", "run_recipe"]

_EXECUTORS = ("local", "slurm", "kubeflow")
_FLAGS = {
    "--dryrun": "show the scripts, the plan and the configuration; starts and writes nothing",
    "--yes": "do not ask; needed where there is no terminal",
    "--no-confirm": "",
    "--detach": "submit and return",
    "--tail-logs": "follow the log",
    "--no-tail-logs": "",
    "--verbose": "NeMo-Run's own messages",
    "-v": "",
    "--help": "this page",
}
_ALWAYS = {
    "config": "a YAML file with sections of the configuration",
    "preprocess": "rows to convert into data.train first (cluster recipes)",
}
_DESCRIBED = re.compile(r"^\s+(\w+): (.+?)\.?$", re.MULTILINE)  # of a docstring's Args
_LONGEST = 400

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
    if arguments and (arguments[0].endswith(".py") or recipe_file(arguments[0])):
        _run_file(recipe_file(arguments[0]) or Path(arguments[0]), arguments[1:])
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

    parameters = {name: p for name, p in inspect.signature(recipe).parameters.items() if name != "ctx"}
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(recipe, parameters))
        return
    try:
        ours, theirs = split_arguments(sys.argv[1:], list(parameters))
        check_arguments(theirs, parameters, executor)
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
        _fail("no terminal to confirm on: say --yes to start, or --dryrun to look" + see(Topic.NO_START))
    sys.argv = [sys.argv[0], *theirs]
    _repair_exit_status()
    try:
        run.cli.main(recipe)
    except Exception as error:
        if "nemo_run/cli" not in (_where(error) or ""):
            raise
        _fail(_last_words(error))


def help_text(recipe: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> str:
    """What a recipe takes, from its own docstring; NeMo-Run's page knows its options only."""
    described = dict(_DESCRIBED.findall(inspect.getdoc(recipe) or ""))
    title = (inspect.getdoc(recipe) or "").partition("\n")[0]
    width = max(len(name) for name in (*parameters, *_ALWAYS))
    rows = [
        f"  {name}=...{'':{width - len(name)}}  {described.get(name, '')} (default: {_shown(parameter.default)})"
        for name, parameter in parameters.items()
    ]
    rows += [f"  {name}=...{'':{width - len(name)}}  {text}" for name, text in _ALWAYS.items()]
    flags = [f"  {flag:{width + 4}}  {text}" for flag, text in _FLAGS.items() if text]
    sections = ", ".join(field.name for field in dataclasses.fields(RestConfig))
    return "\n".join(
        [
            f"usage: nemo-run {Path(sys.argv[0]).name} [--dryrun] [--yes] [key=value ...]", "", title, "",
            "this recipe:", *rows, "",
            "configuration, over what the recipe says:",
            "  section.key=value   every key with its sentence is in megatron_rest/config.py; sections:",
            *textwrap.wrap(sections, 100, initial_indent="    ", subsequent_indent="    "), "",
            "where it runs:",
            "  run.executor=NAME, run.executor.KEY=value   local, slurm or kubeflow, and fields of NeMo-Run's executor",
            "  docs/launch.md has the environment variables (SLURM_ACCOUNT, REST_IMAGE, REST_MOUNTS, ...)", "",
            "flags:", *flags,
        ]
    )  # fmt: skip


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"


def check_arguments(theirs: Sequence[str], parameters: Mapping[str, inspect.Parameter], executor: str) -> None:
    """Raises ValueError for what NeMo-Run's parser would take for something else, or refuse on a page of its own."""
    named = next((word.partition("=")[2] for word in theirs if word.startswith("run.executor=")), executor)
    if named not in _EXECUTORS:
        near = difflib.get_close_matches(named, _EXECUTORS, n=1)
        raise ValueError(f"run.executor={named}: {f'did you mean {near[0]}?' if near else ', '.join(_EXECUTORS)}")
    for word in theirs:
        key, equals, value = word.partition("=")
        if any(ord(character) < 32 for character in word):
            raise ValueError(f"Invalid argument: {key} holds a line break or another control character")
        if word.startswith("-"):
            if key not in _FLAGS:
                near = difflib.get_close_matches(key, _FLAGS, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "settings are written key=value"
                raise ValueError(f"unknown flag {key}: {hint} (--help lists what there is)")
        elif key in parameters:
            _check_parameter(parameters[key], value)
        elif key.startswith("run.executor."):
            _check_executor_key(key, value, named)
        elif equals and key not in ("run.executor",):
            raise ValueError(
                f"unknown argument {word!r}: run.executor=NAME and run.executor.KEY=value are what there is"
            )


def _check_parameter(parameter: inspect.Parameter, value: str) -> None:
    kind, name = parameter.annotation, parameter.name
    if kind is int and not re.fullmatch(r"-?\d{1,9}", value):
        raise ValueError(f"{name}={value}: a whole number")
    if kind is bool and value.lower() not in ("true", "false"):
        raise ValueError(f"{name}={value}: true or false")


def _check_executor_key(key: str, value: str, executor: str) -> None:
    import nemo_run as run

    kinds = {"local": run.LocalExecutor, "slurm": run.SlurmExecutor, "kubeflow": run.KubeflowExecutor}
    field = key.removeprefix("run.executor.").partition("[")[0].partition(".")[0].rstrip("+-*/|&")
    known = {f.name: f.type for f in dataclasses.fields(kinds[executor]) if f.init}
    is_whole = key == f"run.executor.{field}" and known.get(field) in (int, int | None)
    if is_whole and not re.fullmatch(r"-?\d{1,9}|None|null", value):
        raise ValueError(f"{key}={value}: a whole number")
    if value.startswith(("[", "{")):
        try:
            ast.parse(value, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"{key}={value[:_LONGEST]}: not a list or dictionary as Python writes them") from None
    if field not in known:
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean run.executor.{near[0]}?" if near else f"it has {', '.join(known)}"
        raise ValueError(f"{key}: NeMo-Run's executor for {executor} has no {field}: {hint}")


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


def _where(error: BaseException) -> str | None:
    """File of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else None


def _last_words(error: BaseException) -> str:
    """The cause that began it, on one line: NeMo-Run wraps a message into ones that repeat it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__


def _fail(message: str) -> None:
    print(f"nemo-run: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
