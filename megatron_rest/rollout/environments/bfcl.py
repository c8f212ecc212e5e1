"""BFCL's stateful multi-turn tasks as an environment: file system, vehicle, trading, travel, messages, tickets, posts.

A task is a sequence of user turns.  The policy calls tools until it answers without a call; then the next user turn
comes.  Reward 1 when, after every user turn, the objects are in the state that the reference calls lead to and every
result that the reference produces was produced, else 0: the rules of BFCL's own multi-turn checker (bfcl-eval
2026.3.23), with our executor in the place of its ``eval``.

In ``multi_turn_miss_func`` some functions are held out; the user brings them in a later turn.

The API classes and the data come from the package ``bfcl-eval``; only its API modules are imported (its model table
imports the SDKs of every vendor).
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from megatron_rest.regions import HERMES, TOOLRL
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.environments.base import Answer, Message, Observation
from megatron_rest.rollout.environments.calls import Call
from megatron_rest.rollout.environments.executor import LiteralCall, LiteralExecutor
from megatron_rest.types import PromptSample

__all__ = [
    "CATEGORIES",
    "BfclEnvironment",
    "bfcl_environment",
    "bfcl_executor",
    "bfcl_messages",
    "bfcl_native",
    "bfcl_objects",
    "bfcl_prompts",
    "bfcl_rows",
    "bfcl_task",
    "native_tool",
]

CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")

_INSTALL = "pip install --no-deps bfcl-eval==2026.3.23 && pip install mpmath"
_MAX_STEPS = 20  # answers with calls to one user turn, BFCL's own limit
_MAX_RESULT = 20_000  # characters of one result that are shown to the policy
# Unbounded work behind a small literal: 10.0 ** 300 is fine, 10 ** 10 ** 7 keeps a core for minutes.
_LARGEST = {
    "power": ("exponent", 1_000),
    "square_root": ("precision", 1_000),
    "logarithm": ("precision", 1_000),
    "round_number": ("decimal_places", 1_000),
}
_NEW_TOOLS = "I have updated some more functions you can choose from. What about now?"  # BFCL's own words

_SYSTEM = """You are an expert in composing function calls. You may call one or several functions to help the user.

# Tools

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a JSON object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>
When the request is done, or cannot be done, answer without a call."""


class BfclEnvironment:
    """One task; single use.

    Args:
        row: a line of the category's file.
        reference: calls of each user turn, as BFCL writes them.
    """

    def __init__(self, row: dict[str, Any], reference: Sequence[Sequence[str]]) -> None:
        self._row = row
        self._reference = reference
        self._turn = 0  # of the user
        self._steps = 0
        self._has_called = False
        self._is_right = True
        self._results: list[str] = []

    def reset(self) -> None:
        self._objects = bfcl_objects(self._row)
        self._wanted_objects = bfcl_objects(self._row)
        self._executor = bfcl_executor(self._objects)
        self._oracle = bfcl_executor(self._wanted_objects)

    def step(self, answer: Answer) -> Observation:
        found = answer.calls
        if found.calls or found.errors:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                return Observation(done=True)  # BFCL gives such a task up: not solved
            results = [self._run(call) for call in found.calls]
            self._has_called |= bool(found.calls)
            self._results += results
            shown = [*results, *(f"Error during execution: {error}" for error in found.errors)]
            return Observation(messages=tuple(Message(role="tool", content=text[:_MAX_RESULT]) for text in shown))
        self._close_turn()
        self._steps, self._has_called = 0, False
        self._turn += 1
        if self._turn == len(self._row["question"]):
            return Observation(done=True)
        return Observation(messages=tuple(Message(**said) for said in _said(self._row, self._turn)))

    def reward(self) -> float | None:
        """1.0 or 0.0; a task that was not brought to its end is not solved."""
        return float(self._is_right and self._turn == len(self._row["question"]))

    def close(self) -> None:
        self._objects.clear()
        self._wanted_objects.clear()

    def _run(self, call: Call) -> str:
        return self._executor.run(LiteralCall(name=call.name.rpartition(".")[2], keywords=call.arguments))

    def _close_turn(self) -> None:
        """Carry the reference calls of this user turn out on objects of their own, and compare."""
        calls = self._reference[self._turn]
        wanted = [self._oracle.run(call) for call in calls]
        if not calls:
            return  # the policy was meant to notice that something is missing: BFCL looks at the next turn's state
        left = list(self._results)
        for result in wanted:
            if result not in left:
                self._is_right = False
                return
            left.remove(result)
        self._is_right &= self._has_called and all(
            _state(self._objects[name]) == _state(other) for name, other in self._wanted_objects.items()
        )


def bfcl_environment(prompt: PromptSample) -> BfclEnvironment:
    """The environment of a prompt that :func:`bfcl_prompts` made.

    Raises ValueError for another prompt.
    """
    try:
        task = str(json.loads(prompt.ground_truth)["bfcl"])
        rows = _rows_by_id(task.rpartition("_")[0])
        row, reference = rows[task]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"prompt {prompt.prompt_id} is no BFCL task: its ground_truth must be "
            f'{{"bfcl": "multi_turn_base_0"}} or the like, got {prompt.ground_truth[:60]!r}'
        ) from error
    return BfclEnvironment(row, reference)


def bfcl_prompts(
    tokenizer: Any, category: str = "multi_turn_base", *, chat: ChatSettings | None = None
) -> list[PromptSample]:
    """Tools, first user turn, generation prompt; every task of a category.

    Args:
        tokenizer: of transformers, with a chat template (or anything that renders and encodes as one does).
        category: of :data:`CATEGORIES`.
        chat: template and dialect of the run; in ToolRL's and Hermes' the tools stand in the system message as text.
    """
    chat = chat or ChatSettings()
    template = chat.template(tokenizer) if hasattr(tokenizer, "chat_template") else None
    in_text = chat.reads in (TOOLRL, HERMES)
    prompts = []
    for index, row in enumerate(bfcl_rows(category)):
        messages, tools = (bfcl_messages(row), None) if in_text else bfcl_native(row)
        if template is None:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            text = template.render(messages, tools, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(
            PromptSample(
                prompt_id=row["id"],
                token_ids=np.asarray(ids, np.int32),
                ground_truth=bfcl_task(row),
                index=index,
            )
        )
    return prompts


def bfcl_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """System message with the tools, and the first user turn."""
    shown = "\n".join(json.dumps(tool) for tool in _tools(row))
    return [{"role": "system", "content": _SYSTEM.format(tools=shown)}, *_said(row, 0)]


def bfcl_native(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """First user turn and tools, for chat templates that show tools in the model's own dialect."""
    return _said(row, 0), [native_tool(tool["function"]) for tool in _tools(row)]


_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def native_tool(function: dict[str, Any]) -> dict[str, Any]:
    """An OpenAI function of one of BFCL's, whose schemas name Python's types."""
    named = {key: function[key] for key in ("name", "description", "parameters")}
    return {"type": "function", "function": {**named, "parameters": _json_schema(function["parameters"])}}


def _json_schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    schema = {key: _json_schema(held) for key, held in value.items()}
    if isinstance(value.get("type"), str):
        schema["type"] = _JSON_TYPES.get(value["type"], value["type"])
    return schema


def bfcl_task(row: dict[str, Any]) -> str:
    """How :func:`bfcl_environment` finds the task: the ``ground_truth`` of its prompts."""
    return json.dumps({"bfcl": row["id"]})


def bfcl_rows(category: str, *, answers: bool = False) -> list[dict[str, Any]]:
    """Lines of a category's file in the installed package, or of its reference answers."""
    if category not in CATEGORIES:
        raise ValueError(f"BFCL category {category!r} has no environment: known are {', '.join(CATEGORIES)}")
    folder = _package() / "possible_answer" if answers else _package()
    text = (folder / f"BFCL_v4_{category}.json").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def bfcl_objects(row: dict[str, Any]) -> dict[str, object]:
    """Fresh API objects of a task, in its initial state."""
    table = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    objects: dict[str, object] = {}
    for name in row["involved_classes"]:
        target: Any = getattr(importlib.import_module(table.CLASS_FILE_PATH_MAPPING[name]), name)()
        if name not in table.STATELESS_CLASSES:
            scenario = copy.deepcopy(row["initial_config"].get(name, {}))
            target._load_scenario(scenario, long_context="long_context" in row["id"])
        objects[name] = target
    return objects


def bfcl_executor(objects: dict[str, object]) -> LiteralExecutor:
    """Carries calls out on :func:`bfcl_objects`, as far as they end soon."""
    return LiteralExecutor(objects, largest=_LARGEST)


@lru_cache(maxsize=len(CATEGORIES))
def _rows_by_id(category: str) -> dict[str, tuple[dict[str, Any], list[list[str]]]]:
    answers = {row["id"]: row["ground_truth"] for row in bfcl_rows(category, answers=True)}
    return {row["id"]: (row, answers[row["id"]]) for row in bfcl_rows(category)}


@lru_cache(maxsize=64)
def _docs(class_name: str) -> tuple[dict[str, Any], ...]:
    table = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    path = _package() / "multi_turn_func_doc" / table.MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name]
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _tools(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What the policy is shown at first: not what the user brings later."""
    later = [name for names in row.get("missed_function", {}).values() for name in names]
    return [tool for name, tool in _all_tools(row).items() if name not in later]


def _all_tools(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # Rows name an "excluded_function"; the released generator shows it all the same, and so do we.
    docs = [doc for name in row["involved_classes"] for doc in _docs(name)]
    shown = [{key: doc[key] for key in ("name", "description", "parameters")} for doc in docs]
    return {doc["name"]: {"type": "function", "function": doc} for doc in shown}


def _said(row: dict[str, Any], turn: int) -> list[dict[str, str]]:
    """The user's messages of a turn; where functions were held out until now, they and BFCL's sentence."""
    names = row.get("missed_function", {}).get(str(turn), ())
    if not names:
        return [{"role": m["role"], "content": m["content"]} for m in row["question"][turn]]
    tools = _all_tools(row)
    shown = "\n".join(json.dumps(tools[name]) for name in names)
    return [{"role": "user", "content": f"{shown}\n{_NEW_TOOLS}"}]


def _state(target: object) -> dict[str, Any]:
    """Public attributes: what BFCL compares."""
    return {name: value for name, value in vars(target).items() if not name.startswith("_")}


def _package() -> Any:
    try:
        return files("bfcl_eval") / "data"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"BFCL's environments need the package bfcl-eval: {_INSTALL}") from error
