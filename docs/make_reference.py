"""The pages of docs/reference, made from the code they describe.

    python docs/make_reference.py            writes them (make reference)
    python docs/make_reference.py --check    status 1 if a checked-in page differs

Nothing is written down here a second time, environment variables excepted: they have no declaration, so their sentence
stands below, and a variable that the code reads and this table lacks (or the other way round) is an error.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
WIDTH = 125
NOTE = "<!-- made by docs/make_reference.py: edit the code, then make reference -->\n"


# ---------------------------------------------------------------------------------------------------- configuration


def configuration() -> Iterator[str]:
    """Every section and field of the tree: type, default, what it is."""
    from megatron_rest import config

    tree = ast.parse(inspect.getsource(config))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    sections = get_type_hints(config.RestConfig)
    yield "# Configuration\n"
    yield from _paragraph(
        "One tree of sections, in a YAML file or as `section.key=value` behind a command; the order is recipe, "
        "file (`config=FILE.yaml`), single values. An unknown key is an error that names the nearest known one. "
        "A run leaves the whole tree in `<run_dir>/run.yaml`."
    )
    for section, cls in sections.items():
        node = classes[cls.__name__]
        yield f"## {section}\n"
        yield from _paragraph(_plain(ast.get_docstring(node) or ""))
        hints = get_type_hints(cls)
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        for name, annotation, doc in _fields(node):
            kind, values = _kind(hints[name], annotation)
            yield from _item(
                f'<a id="{section}.{name}"></a>`{section}.{name}` ({kind}, default {_default(defaults[name])})',
                _plain(doc),
            )
            for value, meaning in values:
                yield from _item(f"`{value}`", meaning, depth=1)
        yield ""


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Name, annotation and the sentence under each field."""
    for i, statement in enumerate(node.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            doc = node.body[i + 1] if i + 1 < len(node.body) else None
            if not (isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)):
                raise SystemExit(f"{node.name}.{statement.target.id} has no sentence under it")
            yield statement.target.id, ast.unparse(statement.annotation), str(doc.value.value)


def _kind(hint: Any, annotation: str) -> tuple[str, list[tuple[str, str]]]:
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        lines = inspect.getsource(hint).splitlines()
        found = (re.match(r'\s+\w+ = "(\w+)"(?:  # (.*))?', line) for line in lines)
        return "one of", [(m[1], m[2] or "") for m in found if m]
    return annotation.replace("dict[str, Any]", "mapping").replace("str", "text"), []


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:  # a mapping
        return "empty"
    if isinstance(value, bool) or value is None:
        return f"`{'null' if value is None else str(value).lower()}`"
    return f"`{value}`" if str(value) else "empty"


# ------------------------------------------------------------------------------------------------------ command line


class _Parser(Exception):  # how a parser leaves the main() that made it
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def command_line() -> Iterator[str]:
    """Every command with its arguments, make targets and recipes included."""
    from megatron_rest import cli

    yield "# Command line\n"
    yield from _paragraph(
        "`make` sets up and runs what a newcomer needs, `nemo-run` starts recipes, `megatron-rest-data` prepares data, "
        "`megatron-rest` does everything else. Each command says the same with `--help`."
    )
    yield "## make\n"
    for target, what in re.findall(r"^([a-z-]+):.*## (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE):
        yield from _item(f"`make {target}`", _escape(what))
    yield "\n## nemo-run RECIPE\n"
    yield from _recipes()
    for name, (module, _) in cli.commands().items():
        yield from _command(f"megatron-rest {name}", module)
    yield from _command("megatron-rest-data", "data_tools.cli")
    for module in ("megatron_rest.rollout.host", "megatron_rest.analysis.variance"):
        yield from _command(f"python -m {module}", module)


def _recipes() -> Iterator[str]:
    from launch import cli

    yield from _paragraph("Of every recipe:")
    for flag, what in cli._FLAGS.items():
        if what:
            yield from _item(f"`{flag}`", _escape(what))
    for name, what in cli._ALWAYS.items():
        yield from _item(f"`{name}=`", _escape(what))
    yield from _item("`section.key=value`", "[configuration](configuration.md)")
    yield from _item("`run.executor=NAME`, `run.executor.KEY=value`", "NeMo-Run's executor and its fields")
    for path in sorted((ROOT / "launch").glob("rest_*.py")):
        what, arguments = _recipe(path)
        yield f"\n### launch/{path.name}\n"
        yield from _paragraph(_escape(what))
        for name, shown, text in arguments:
            yield from _item(f"`{name}={shown}`", _escape(text))
    yield ""


def _recipe(path: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """What a launch file is for; name, default and meaning of each of its arguments.  Read, not imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    values = {
        n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
    }

    def shown(node: ast.expr) -> str:
        value = ast.unparse(values.get(node.id, node) if isinstance(node, ast.Name) else node)
        return {"True": "true", "False": "false"}.get(value, value.strip("'"))

    made = values.get(path.stem)
    if isinstance(made, ast.Call):  # by cluster_recipe, of which all have the same arguments
        from launch.stages import HELP, Stages

        given = {word.arg: word.value for word in made.keywords}
        rows = [
            (field.name, shown(ast.Constant(field.default)), HELP[field.name])
            for field in dataclasses.fields(Stages)
            if field.name in HELP
        ]
        rows.insert(0, ("nodes", shown(given["nodes"]), ast.literal_eval(given["nodes_help"])))
        if "families" in given:
            recipes = values[made.args[2].id] if isinstance(made.args[2], ast.Name) else made.args[2]
            assert isinstance(recipes, ast.Dict)
            rows.append(("family", ast.literal_eval(recipes.keys[0]), ast.literal_eval(given["families"])))
        return ast.literal_eval(made.args[1]), [(name, default, text.rstrip(".")) for name, default, text in rows]
    entry = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == path.stem)
    text = ast.get_docstring(entry) or ""
    described = dict(re.findall(r"^\s*(\w+): (.+?)\.?$", text, re.MULTILINE))
    names = [argument.arg for argument in entry.args.args[len(entry.args.args) - len(entry.args.defaults) :]]
    if missing := [name for name in names if name not in described]:
        raise SystemExit(f"{path}: the docstring of {entry.name} does not describe {missing[0]}")
    rows = [(name, shown(default), described[name]) for name, default in zip(names, entry.args.defaults, strict=True)]
    return " ".join(text.partition("\n\n")[0].split()), rows


def _command(name: str, module: str) -> Iterator[str]:
    parser = _parser_of(module)
    yield f"## {name}\n"
    yield from _description(parser)
    yield from _arguments(parser)
    for sub in parser._actions:
        if isinstance(sub, argparse._SubParsersAction):
            for command, child in sub.choices.items():
                yield f"\n### {name} {command}\n"
                if not child.description:
                    helps = {choice.dest: choice.help or "" for choice in sub._choices_actions}
                    yield from _paragraph(_sentence(_escape(helps[command])))
                yield from _description(child)
                yield from _arguments(child)
    yield ""


def _parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a main() builds, caught when it is about to parse."""

    def leave(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        raise _Parser(self)

    kept = argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_known_intermixed_args
    argparse.ArgumentParser.parse_known_args = leave  # type: ignore[method-assign,assignment]
    argparse.ArgumentParser.parse_known_intermixed_args = leave  # type: ignore[method-assign,assignment]
    try:
        importlib.import_module(module).main([])
    except _Parser as caught:
        return caught.parser
    finally:
        argparse.ArgumentParser.parse_known_args = kept[0]  # type: ignore[method-assign]
        argparse.ArgumentParser.parse_known_intermixed_args = kept[1]  # type: ignore[method-assign]
    raise SystemExit(f"{module}.main parses nothing")


def _description(parser: argparse.ArgumentParser) -> Iterator[str]:
    text = (parser.description or "").strip()
    if not text:
        return
    if parser.formatter_class is argparse.RawDescriptionHelpFormatter:
        yield f"```text\n{text}\n```\n"
    else:
        yield from _paragraph(_sentence(_plain(text)))


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        kinds = (argparse._HelpAction, argparse._SubParsersAction)
        if isinstance(action, kinds) or action.help == argparse.SUPPRESS:
            continue
        value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
        names = ", ".join(action.option_strings)
        shown = f"{names} {value}".strip() if names else formatter._format_args(action, action.dest)
        needed = " (needed)" if action.option_strings and action.required else ""
        yield from _item(f"`{shown}`{needed}", _escape(formatter._expand_help(action) if action.help else ""))


# --------------------------------------------------------------------------------------------------------- Python API

EMBEDDED = (  # what others import
    *("megatron_rest.ops", "megatron_rest.regions", "megatron_rest.weighting", "megatron_rest.algorithms"),
    *("megatron_rest.rewards", "megatron_rest.mcore.output", "megatron_rest.mcore.step_loss"),
    *("megatron_rest.data.prompts", "megatron_rest.rollout.environments.base"),
)


def python_api() -> Iterator[str]:
    """Public names (``__all__``) of the modules that are meant to be imported, with signature and docstring."""
    yield "# Python API\n"
    yield from _paragraph(
        "What is meant to be imported by others: [embedding](../embedding.md) shows how it fits together. Up to "
        "`algorithms` only torch, numpy and PyYAML are needed, for `mcore` Megatron-Core."
    )
    for name in EMBEDDED:
        module = importlib.import_module(name)
        yield f"## {name}\n"
        yield from _paragraph(_plain((inspect.getdoc(module) or "").partition("\n\n")[0]))
        for public in module.__all__:
            yield from _public(public, getattr(module, public))


def _public(name: str, value: Any) -> Iterator[str]:
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return
    yield f"### {name}\n"
    yield f"```python\n{_signature(name, value)}\n```\n"
    doc = inspect.getdoc(value) if value.__doc__ and not value.__doc__.startswith(f"{name}(") else ""
    if doc:
        yield f"```text\n{doc}\n```\n"
    methods = [(n, m) for n, m in vars(value).items() if not n.startswith("_")] if inspect.isclass(value) else []
    for method, function in methods:
        function = function.__func__ if isinstance(function, classmethod | staticmethod) else function
        if inspect.isfunction(function) and function.__doc__:
            first = _plain((inspect.getdoc(function) or "").partition("\n\n")[0])
            yield from _item(f"`{method}`", first)
    yield ""


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, enum.Enum):  # how one is called differs between Pythons
        values = ((m.name, f'"{m.value}"' if isinstance(m.value, str) else m.value) for m in value)
        return "\n".join(f"{name}.{member} = {as_written}" for member, as_written in values)
    try:
        signature = inspect.signature(value)
    except ValueError:  # nothing that is called
        return name
    unstable = [p for p in signature.parameters.values() if " at 0x" in repr(p.default)]  # other addresses every time
    named = {p.name: p.replace(default=...) for p in unstable}
    signature = signature.replace(parameters=[named.get(p.name, p) for p in signature.parameters.values()])
    plain = re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"\1", str(signature).replace("Ellipsis", "..."))
    one = name + re.sub(r"(: |-> )'([^']*)'", r"\1\2", plain)
    if len(one) <= WIDTH:
        return one
    inside, _, returned = one.removeprefix(f"{name}(").rpartition(")")
    parts = re.split(r", (?=\*|\w+[:=,)]|\w+$)", inside)
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returned}"])


# ---------------------------------------------------------------------------------------------- environment variables

YOURS = {
    "NEMORUN_HOME": "NeMo-Run's scripts and logs; on a cluster a folder that every node sees.",
    "SLURM_ACCOUNT": "Account that jobs are charged to.",
    "SLURM_PARTITION": "Partition that jobs are queued in.",
    "REST_IMAGE": "Container of the ranks and engines (Slurm: a .sqsh file; Kubernetes: an image). Empty: none.",
    "REST_PYTHON": "Interpreter on the nodes. Needed without a container, since a login node's own has no torch.",
    "REST_MOUNTS": "Slurm: mounts of the container, `host:inside`, with commas. Kubernetes: claims, `claim:path`.",
    "REST_INTERFACE": "Network interface between the nodes: addresses of ranks and engines, gloo, NCCL.",
    "REST_ENV": "Further variables of the job, words of NAME=value. NAME+=value puts value before what is there.",
    "REST_CPU_PARTITION": "Slurm partition of the job that prepares data, which takes 8 cores and no GPU.",
    "REST_SSH": "Submit from another machine: `user@login-node`.",
    "REST_SSH_DIR": "Folder there for NeMo-Run's files.",
    "REST_NAMESPACE": "Kubernetes namespace (`default`).",
    "REST_RUNTIME": "Name of the ClusterTrainingRuntime (`torch-distributed`).",
    "NO_COLOR": "Set: no colours on a terminal.",
    "CUDA_VISIBLE_DEVICES": "GPUs of a process, and of the engines it starts. Empty: compute on the CPU.",
    "MASTER_ADDR": "Address of rank 0. Given in REST_ENV it replaces the one that the launcher finds.",
    "GLOO_SOCKET_IFNAME": "Interface of gloo; kept if you set it, else REST_INTERFACE.",
    "NCCL_SOCKET_IFNAME": "Interface of NCCL's sockets; kept if you set it, else REST_INTERFACE.",
    "TORCH_GLOO_LAZY_INIT": "1, unless you set it: gloo connects two ranks when they first talk.",
}
LAUNCHERS = {
    "RANK": "Rank of a process. Not set: the process is the only rank.",
    "WORLD_SIZE": "Ranks in all.",
    "LOCAL_RANK": "Rank within its node: which GPU it takes.",
    "LOCAL_WORLD_SIZE": "Ranks of this node.",
    "MASTER_PORT": "Port of rank 0.",
    "REST_CODE": "Commit and digest of the shipped code, for `starts.jsonl`.",
    "REST_USER_CODE": "`package=digest` words of your own packages that were shipped; compared where they run.",
    "REST_ENGINE_FOLDER": "Folder in which nodes of engines announce themselves.",
    "REST_GPUS_PER_NODE": "GPUs of a node of engines.",
    "REST_JOB_LOG": "File of the job's own log, for the one line that says why a rank ended.",
    "MLFLOW_TRACKING_URI": "Where the logger `mlflow` writes; default: a folder of the run.",
    "MLFLOW_ALLOW_FILE_STORE": "Set where that folder is used: newer clients ask for it.",
    "TRACKIO_DIR": "Where the logger `trackio` writes; default: a folder of the run.",
    "SLURM_JOB_ID": "Which job holds a run folder.",
    "SLURM_HET_JOB_ID": "The same of a heterogeneous job.",
    "SLURM_HET_SIZE": "Groups of a heterogeneous job.",
}
INTERNAL = {  # set by us for libraries, or not of the environment at all
    *(
        "INCLUDE_WORKSPACE_FILE",
        "PATH",
        "PYTHONPATH",
        "TOKENIZERS_PARALLELISM",
        "TORCHDYNAMO_DISABLE",
        "TORCHELASTIC_RUN_ID",
    ),
    *("SLURM_RESTART_COUNT", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"),
}


def environment() -> Iterator[str]:
    """Variables that the code reads."""
    seen = set(_variables())
    known = {*YOURS, *LAUNCHERS, *INTERNAL}
    if seen - known:
        raise SystemExit(f"docs/make_reference.py says nothing of {', '.join(sorted(seen - known))}: add a sentence")
    unread = {name for name in known - INTERNAL if name not in seen}
    if unread:
        raise SystemExit(f"docs/make_reference.py describes what nothing reads: {', '.join(sorted(unread))}")
    yield "# Environment variables\n"
    yield from _paragraph(
        "Everything about a run is in its configuration; the environment says where it runs. Secrets "
        "(`WANDB_API_KEY`, tokens) are exported in the shell that submits and stand in no file."
    )
    yield "## What you set\n"
    for name, what in YOURS.items():
        yield from _item(f"`{name}`", what)
    yield "\n## What the launcher sets\n"
    yield from _paragraph("torchrun, Slurm's scripts or the recipe give these to each process.")
    for name, what in LAUNCHERS.items():
        yield from _item(f"`{name}`", what)
    yield "\n## Of other projects, worth knowing\n"
    for name, what in (
        (
            "VLLM_USE_V2_MODEL_RUNNER=0",
            "vLLM's older runner ([rollout.md](../rollout.md#vllms-two-model-runners)).",
        ),
        ("VLLM_BATCH_INVARIANT=1", "vLLM's log-probs do not depend on the batch, on GPUs that have the kernels."),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO=0", "Transformer Engine takes deterministic attention only."),
        ("OMP_NUM_THREADS", "Not needed: `trainer.threads`, else the cores divided by the ranks, decides."),
    ):
        yield from _item(f"`{name}`", what)


def _variables() -> Iterator[str]:
    """Names that are looked up in an environment, and every REST_ name."""
    name = r"""["']([A-Z][A-Z0-9_]+)["']"""
    access = re.compile(rf"environ(?:\.get|\.setdefault|\.pop)?[(\[]\s*{name}|{name} (?:not )?in (?:os\.)?environ")
    for package in ("megatron_rest", "launch", "data_tools"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            yield from (m[1] or m[2] for m in access.finditer(text))
            yield from re.findall(r"\bREST_(?:[A-Z]+_)*[A-Z]+\b", text)


# --------------------------------------------------------------------------------------------------------------- text


def _plain(text: str) -> str:
    """A docstring's words: one paragraph, its markup as Markdown's."""
    return _escape(re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split())))


def _escape(text: str) -> str:
    """What Markdown would take for a tag or for emphasis, outside code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([<*])", r"\\\1", part) for part in parts)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) else ".")


def _paragraph(text: str) -> Iterator[str]:
    yield _wrap(text) + "\n"


def _item(head: str, text: str, depth: int = 0) -> Iterator[str]:
    indent = "    " * depth
    yield _wrap(f"{head}: {text}" if text else head, first=f"{indent}- ", rest=f"{indent}  ")


def _wrap(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "configuration.md": configuration,
    "command_line.md": command_line,
    "environment.md": environment,
    "python_api.md": python_api,
}


def main() -> int:
    """Write the pages, or compare them with what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is not current")
    check = parser.parse_args().check
    sys.path[:0] = [str(ROOT)]
    old = []
    for name, page in PAGES.items():
        text = NOTE + "\n".join(page()).rstrip() + "\n"
        path = REFERENCE / name
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            old.append(f"docs/reference/{name}")
        elif not check:
            path.write_text(text, encoding="utf-8")
    if old:
        print(f"not as the code is now: {', '.join(old)}: run make reference", file=sys.stderr)
    return int(bool(old))


if __name__ == "__main__":
    sys.exit(main())
