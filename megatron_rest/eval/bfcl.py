"""BFCL v4 (Berkeley Function Calling Leaderboard), judged by its released checker; here the single-turn categories.

The package (``bfcl-eval``) brings data and checker.  Its checker imports a table of model handlers, and through it the
SDK of every vendor, to look up one flag; the table is stood in for while the checker is imported.  Its executor, which
evaluates model output as Python, is not imported: our answers are JSON and stay data.

What the leaderboard does with a handler's output happens here with parsed JSON calls: a call ``{"name": f,
"parameters": p}`` is ``{f: p}`` to the checker; an answer without a readable call passes irrelevance and fails the
rest.  Conversations: ``bfcl_multi_turn.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from megatron_rest.data.prompt_style import ROLE_SENTENCE, write_tools
from megatron_rest.eval import bfcl_multi_turn
from megatron_rest.eval.cases import CORRECT, EvalCase, Score
from megatron_rest.rewards.parsing import ToolCall, ToolCallError, answer_text, parse_tool_calls
from megatron_rest.rollout.environments.bfcl import native_tool

__all__ = ["CATEGORIES", "SINGLE_TURN", "data_folder", "load", "load_entries", "load_possible_answers", "score"]

AST_CATEGORIES = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
)
NO_CALL_CATEGORIES = ("irrelevance", "live_irrelevance")  # right is an answer without a call
ANY_CALL_CATEGORIES = ("live_relevance",)  # right is an answer with any call
SINGLE_TURN = AST_CATEGORIES + NO_CALL_CATEGORIES + ANY_CALL_CATEGORIES
CATEGORIES = SINGLE_TURN + bfcl_multi_turn.CATEGORIES

_PREFIX = "BFCL_v4_"
_MODEL = "megatron-rest"  # any name will do: it selects nothing
_INSTALL = "pip install --no-deps bfcl-eval==2026.3.23 mpmath"
_LANGUAGES = {"simple_java": "JAVA", "simple_javascript": "JAVASCRIPT"}
_HINTS = {
    "simple_java": ("Java 8 SDK", "Java"),
    "simple_javascript": ("JavaScript", "JavaScript"),
}


def load(categories: tuple[str, ...] = CATEGORIES) -> list[EvalCase]:
    """The cases of the given categories, in the package's order.

    Raises:
        ValueError: a category that does not exist.
        ModuleNotFoundError: the package ``bfcl-eval`` is not installed; the message says how to.
    """
    unknown = sorted(set(categories) - set(CATEGORIES))
    if unknown:
        raise ValueError(f"BFCL has no category {', '.join(unknown)}; it has {', '.join(CATEGORIES)}")
    return [case for category in categories for case in _cases(category)]


def _cases(category: str) -> list[EvalCase]:
    if category in bfcl_multi_turn.CATEGORIES:
        return bfcl_multi_turn.load(category)
    answers = load_possible_answers(category) if category in AST_CATEGORIES else {}
    return [
        EvalCase(
            case_id=entry["id"],
            category=category,
            messages=_messages(entry, category),
            native_messages=tuple(entry["question"][0]),
            native_tools=tuple(native_tool(_described(function, category)) for function in entry["function"]),
            score=partial(score, category=category, entry=entry, possible=answers.get(entry["id"])),
        )
        for entry in load_entries(category)
    ]


def data_folder() -> Path:
    """Where the installed package keeps its data; nothing of it is imported."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"BFCL needs the package bfcl-eval: {_INSTALL}", name="bfcl_eval")
    return Path(spec.submodule_search_locations[0]) / "data"


def load_entries(category: str) -> list[dict[str, Any]]:
    """Rows ``{"id", "question", "function"}`` of a category."""
    return _json_lines(data_folder() / f"{_PREFIX}{category}.json")


def load_possible_answers(category: str) -> dict[str, list[dict[str, Any]]]:
    """Accepted values by case: ``{id: [{function: {parameter: [accepted, ...]}}]}``."""
    rows = _json_lines(data_folder() / "possible_answer" / f"{_PREFIX}{category}.json")
    return {row["id"]: row["ground_truth"] for row in rows}


def score(answer: str, *, category: str, entry: dict[str, Any], possible: list[dict[str, Any]] | None = None) -> Score:
    """Judge the text of an answer to ``entry``; ``possible`` as in :func:`load_possible_answers`."""
    try:
        calls: tuple[ToolCall, ...] = parse_tool_calls(answer_text(answer))
        unreadable = ""
    except ToolCallError as error:
        calls, unreadable = (), str(error)
    if category in NO_CALL_CATEGORIES:
        return _outcome(not calls, "call where none fits", f"{len(calls)} calls")
    if category in ANY_CALL_CATEGORIES or not calls:
        return _outcome(bool(calls), "no readable call", unreadable)
    return _check(calls, category=category, entry=entry, possible=possible)


def _outcome(is_correct: bool, outcome: str, detail: str) -> Score:
    return Score(is_correct=is_correct, outcome=CORRECT if is_correct else outcome, detail="" if is_correct else detail)


def _check(
    calls: tuple[ToolCall, ...], *, category: str, entry: dict[str, Any], possible: list[dict[str, Any]] | None
) -> Score:
    if not all(isinstance(call.name, str) for call in calls):
        return _outcome(False, "no readable call", "a function's name is no string")
    checker, languages = _official_checker()
    language = languages[_LANGUAGES.get(category, "PYTHON")]
    output = [{call.name: call.parameters} for call in calls]
    try:
        verdict = checker(entry["function"], output, possible, language, category, _MODEL)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        # Values of shapes its authors did not think of end the official checker; they match no accepted value.
        return _outcome(False, "checker gave up", f"{type(error).__name__}: {error}")
    return _outcome(verdict["valid"], verdict.get("error_type", "unknown"), "; ".join(map(str, verdict["error"])))


@functools.cache
def _official_checker() -> tuple[Any, Any]:
    """``ast_checker`` and ``Language`` of the package, imported without its model handlers."""
    data_folder()  # says how to install it
    name = "bfcl_eval.constants.model_config"
    before = sys.modules.get(name)
    table = ModuleType(name)
    table.MODEL_CONFIG_MAPPING = defaultdict(lambda: SimpleNamespace(underscore_to_dot=False))  # type: ignore[attr-defined]
    sys.modules[name] = table
    try:
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
    return ast_checker, Language


def _messages(entry: dict[str, Any], category: str) -> tuple[dict[str, str], ...]:
    """System message with the tools, then what the user said, in the form the training data has."""
    (turn,) = entry["question"]
    role = "\n\n".join([ROLE_SENTENCE, *(m["content"] for m in turn if m["role"] == "system")])
    tags = {"user": "user", "assistant": "response", "tool": "obs"}
    said = [f"<{tags[m['role']]}> {m['content']} </{tags[m['role']]}>" for m in turn if m["role"] != "system"]
    tools = [_tool(function, category) for function in entry["function"]]
    return (
        {"role": "system", "content": write_tools(role, tools)},
        {"role": "user", "content": "**Dialogue Records History**\n" + "\n".join(said)},
    )


def _tool(function: dict[str, Any], category: str) -> dict[str, Any]:
    """A function in ToolRL's form: the parameters themselves, each required one marked."""
    described = _described(function, category)
    required = function["parameters"].get("required", [])
    described["parameters"] = {
        name: {**value, "required": True} if name in required else value
        for name, value in described["parameters"].get("properties", {}).items()
    }
    return described


def _described(function: dict[str, Any], category: str) -> dict[str, Any]:
    """A function as the leaderboard shows it to models that answer in JSON: Java and JavaScript values are strings."""
    described = dict(function)
    properties = {name: dict(value) for name, value in function["parameters"].get("properties", {}).items()}
    if category in _HINTS:
        syntax, language = _HINTS[category]
        described["description"] += f" The function is written in {syntax} syntax."
        for value in properties.values():
            of = f" of {value['items']['type']}" if "items" in value else ""
            value["description"] = f"{value['description']} A {language} {value['type']}{of}, written as a string."
            value["type"] = "string"
            value.pop("items", None)
    described["parameters"] = {**function["parameters"], "properties": properties}
    return described


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
