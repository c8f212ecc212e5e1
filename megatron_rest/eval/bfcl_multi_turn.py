"""BFCL v4, multi-turn categories: conversations judged by the released checker, calls carried out by our executor.

The checker replays the model's calls and the reference's on objects of their own, and compares states and results
after every turn of the user.  Where it would hand calls to BFCL's executor, which evaluates them as Python, it gets
``rollout/environments/executor.py``: public methods, literal arguments.  Calls are read as the environment reads them
(``rollout/environments/calls.py``), so what is judged is what was carried out.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from functools import partial
from types import ModuleType
from typing import Any

from megatron_rest.eval.cases import CORRECT, EvalCase, Score
from megatron_rest.rollout.environments.bfcl import (
    CATEGORIES,
    bfcl_executor,
    bfcl_messages,
    bfcl_native,
    bfcl_objects,
    bfcl_rows,
    bfcl_task,
)
from megatron_rest.rollout.environments.calls import parse_calls
from megatron_rest.rollout.environments.executor import LiteralCall, LiteralExecutor

__all__ = ["CATEGORIES", "load", "score"]

_CHECKER = "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker"


def load(category: str) -> list[EvalCase]:
    """The 200 cases of a category, in the package's order.

    Raises ModuleNotFoundError with the command that installs ``bfcl-eval`` if it is not there.
    """
    references = {row["id"]: row["ground_truth"] for row in bfcl_rows(category, answers=True)}
    cases = []
    for row in bfcl_rows(category):
        native_messages, native_tools = bfcl_native(row)
        case = EvalCase(
            case_id=row["id"],
            category=category,
            messages=tuple(bfcl_messages(row)),
            score=partial(score, row=row, reference=references[row["id"]]),
            environment="bfcl",
            task=bfcl_task(row),
            native_messages=tuple(native_messages),
            native_tools=tuple(native_tools),
        )
        cases.append(case)
    return cases


def score(turns: list[list[str]], *, row: dict[str, Any], reference: list[list[str]]) -> Score:
    """Judge what a model said, a list for each turn of the user.

    Args:
        turns: texts of a conversation; texts without a readable call carry nothing out.
        row: the task, a line of the category's file.
        reference: BFCL's calls by turn.
    """
    if len(turns) != len(reference):
        what = f"{len(turns)} turns of {len(reference)}: more answers with calls than allowed, or no room left"
        return Score(is_correct=False, outcome="unfinished", detail=what)
    return check([[_calls(text) for text in turn] for turn in turns], row=row, reference=reference)


def check(turns: list[list[list[LiteralCall]]], *, row: dict[str, Any], reference: list[list[str]]) -> Score:
    """The released checker's verdict on calls by turn and answer; answers without a call count as none."""
    checker, name = _checker(), f"check {next(_numbers)}"
    steps = [[calls for calls in turn if calls] for turn in turns]
    try:
        verdict = checker.multi_turn_checker(steps, reference, row, row["id"].rpartition("_")[0], name)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        # States of shapes its authors did not think of end the official checker; they equal no reference's.
        return Score(is_correct=False, outcome="checker gave up", detail=f"{type(error).__name__}: {error}")
    finally:
        for key in [key for key in _executors if key.startswith(name)]:
            del _executors[key]
    if verdict["valid"]:
        return Score(is_correct=True, outcome=CORRECT)
    return Score(is_correct=False, outcome=verdict["error_type"], detail=str(verdict["error_message"]))


def _calls(text: str) -> list[LiteralCall]:
    return [LiteralCall(name=c.name.rpartition(".")[2], keywords=c.arguments) for c in parse_calls(text).calls]


_numbers = itertools.count()
_executors: dict[str, tuple[dict[str, object], LiteralExecutor]] = {}
"""Objects of the checks under way, by the name under which the checker asks for them."""


def _execute(
    func_call_list: list[LiteralCall | str],
    initial_config: dict[str, Any],
    involved_classes: list[str],
    model_name: str,
    test_entry_id: str,
    long_context: bool = False,
    is_evaL_run: bool = False,
) -> tuple[list[str], dict[str, object]]:
    """In the place of BFCL's function of the same signature: results as text, and the objects by class."""
    if model_name not in _executors:
        row = {"id": test_entry_id, "initial_config": initial_config, "involved_classes": involved_classes}
        objects = bfcl_objects(row)
        _executors[model_name] = (objects, bfcl_executor(objects))
    objects, executor = _executors[model_name]
    return [executor.run(call) for call in func_call_list], objects


@functools.cache
def _checker() -> ModuleType:
    """A copy of the released module of our own, with our executor; the package itself is left as it is."""
    spec = importlib.util.find_spec(_CHECKER)
    assert spec is not None and spec.loader is not None, "the data of the same package was there"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.execute_multi_turn_func_call = _execute  # type: ignore[attr-defined]
    return module
