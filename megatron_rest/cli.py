"""Console script ``megatron-rest``: one name for everything that is not a recipe (``nemo-run``) or data preparation.

A command is imported when it is called, so that ``megatron-rest --help`` answers at once and ``report`` needs no torch.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["commands", "main"]

# name: (module with main(argv) -> exit status, one line of help)
_COMMANDS = {
    "doctor": ("megatron_rest.doctor", "what is installed, what is accelerated, what is missing and how to get it"),
    "train": (
        "megatron_rest.trainer.__main__",
        "train with ResT (train CONFIG.yaml); several ranks: torchrun -m megatron_rest.trainer",
    ),
    "warm-start": ("megatron_rest.commands.warm_start", "supervised training on reference answers; torchrun's ranks"),
    "init-model": ("megatron_rest.commands.init_model", "a small Qwen3-architecture model with random weights"),
    "import-gguf": ("megatron_rest.commands.import_gguf", "a GGUF file (Llama, Qwen2, Qwen3) as an HF folder"),
    "eval": ("megatron_rest.eval.__main__", "ask and score a model on API-Bank and BFCL"),
    "export": ("megatron_rest.commands.export", "a run's Megatron checkpoint as an HF folder"),
    "reshard": (
        "megatron_rest.commands.reshard",
        "a checkpoint again, for any layout; on torchrun's ranks",
    ),
    "report": ("megatron_rest.analysis.report", "summary table and plots of a run"),
    "compare": ("megatron_rest.analysis.compare", "runs side by side in one plot and table"),
    "replay": ("megatron_rest.replay.__main__", "a recorded microbatch again in float64: which term differs"),
    "resume-check": ("megatron_rest.commands.resume_check", "prove that a killed run continues byte by byte as it was"),
    "plan-sync": ("megatron_rest.weight_sync.limits", "how fast weights can reach the engines, from the links' rates"),
    "plan": ("megatron_rest.planner.__main__", "memory and time of a configuration before it runs"),
    "simulate": (
        "megatron_rest.simulate.__main__",
        "what a recipe does at its real size, on a CPU",
    ),
}


def commands() -> dict[str, tuple[str, str]]:
    """The commands of this installation: those whose module is there."""
    return {name: entry for name, entry in _COMMANDS.items() if _exists(entry[0])}


def main(argv: Sequence[str] | None = None) -> int:
    """Call a command with what follows its name; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(known))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(importlib.import_module("megatron_rest").__version__)
        return 0
    name, *rest = arguments
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        print(f"megatron-rest: no command {name!r}: {hint}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(known[name][0])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("megatron_rest"):
            raise
        print(
            f"megatron-rest {name}: {error.name} is not installed: make setup, or pip install -e '.[train]'",
            file=sys.stderr,
        )
        return 1
    return int(module.main(rest) or 0)


def _usage(known: dict[str, tuple[str, str]]) -> str:
    lines = [f"  {name:12s} {text}" for name, (_, text) in known.items()]
    head = "usage: megatron-rest COMMAND [arguments]   (COMMAND --help says more)"
    return "\n".join([head, "", *lines, "", "recipes: nemo-run launch/NAME.py; data: megatron-rest-data"])


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


if __name__ == "__main__":
    sys.exit(main())
