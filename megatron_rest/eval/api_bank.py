"""API-Bank (Li et al., EMNLP 2023; arXiv 2304.08244), levels 1 to 3, 597 cases, as ToolRL and ResT ask it: one call.

Two scores.  *Strict*: the answer holds exactly one readable call, and name and parameters equal the reference.  *Soft*,
the published one: any call of the answer may be the right one, a call without ``name`` or ``parameters`` is taken for
the parameters alone, and lines that are not JSON are passed over.  The published script also keeps successes of earlier
runs; here every run scores only its own answers.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rest.eval.cases import CORRECT, EvalCase, Score
from megatron_rest.rewards.parsing import ToolCall, ToolCallError, answer_text, parse_tool_calls, thought_end

__all__ = ["CATEGORIES", "DATA", "load", "score"]

DATA = Path(__file__).with_name("data") / "api_bank"
CATEGORIES = ("level-1", "level-2", "level-3")


def load(folder: str | Path = DATA, categories: tuple[str, ...] = CATEGORIES) -> list[EvalCase]:
    """The cases of the given levels, in file order.

    Raises:
        ValueError: a category that does not exist, or a row without system, user and exactly one reference call.
    """
    unknown = sorted(set(categories) - set(CATEGORIES))
    if unknown:
        raise ValueError(f"API-Bank has no category {', '.join(unknown)}; it has {', '.join(CATEGORIES)}")
    cases = []
    for category in categories:
        path = Path(folder) / f"{category}-api_processed.json"
        for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            cases.append(_case(category, number, row, path))
    return cases


def _case(category: str, number: int, row: Any, path: Path) -> EvalCase:
    try:
        answer = row["answer"]
        (reference,) = answer if isinstance(answer, list) else [answer]
        call = {"name": reference["name"], "parameters": reference["parameters"]}
        messages = tuple({"role": role, "content": row[role]} for role in ("system", "user"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, row {number}: not a case of API-Bank ({type(error).__name__}: {error})") from error
    return EvalCase(
        case_id=f"{category}/{number}", category=category, messages=messages, score=partial(score, reference=call)
    )


def score(answer: str, *, reference: dict[str, Any]) -> Score:
    """Judge the text of an answer against ``{"name", "parameters"}``."""
    text = answer_text(answer)
    outcome, detail = _strict(text, reference)
    return Score(
        is_correct=outcome == CORRECT,
        outcome=outcome,
        detail=detail,
        is_soft_correct=any(_soft_call(line, reference) == reference for line in _soft_lines(text)),
    )


def _strict(text: str, reference: dict[str, Any]) -> tuple[str, str]:
    if "<tool_call>" not in text[thought_end(text) :]:
        return "no call", "the answer has no <tool_call>"
    try:
        calls = parse_tool_calls(text)
    except ToolCallError as error:
        return "unreadable call", str(error)
    if len(calls) != 1:
        return "several calls", f"{len(calls)} calls where one was asked for"
    return _difference(calls[0], reference)


def _difference(call: ToolCall, reference: dict[str, Any]) -> tuple[str, str]:
    if call.name != reference["name"]:
        return "wrong name", f"expected {reference['name']!r}, got {call.name!r}"
    wanted, given = reference["parameters"], call.parameters
    for outcome, names in (("missing argument", wanted.keys() - given), ("extra argument", given.keys() - wanted)):
        if names:
            return outcome, ", ".join(sorted(names))
    for name, value in wanted.items():
        if not _is_same(given[name], value):
            return "wrong value", f"{name}: expected {value!r}, got {given[name]!r}"
    return CORRECT, ""


def _is_same(given: Any, wanted: Any) -> bool:
    """JSON has no truth value that equals a number; Python has."""
    return bool(given == wanted) and isinstance(given, bool) == isinstance(wanted, bool)


def _soft_lines(text: str) -> list[Any]:
    body = text[thought_end(text) :]
    _, opened, rest = body.partition("<tool_call>")
    lines = rest.partition("</tool_call>")[0].strip().splitlines() if opened else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found


def _soft_call(value: Any, reference: dict[str, Any]) -> Any:
    if isinstance(value, dict) and not {"name", "parameters"} <= value.keys():
        return {"name": reference["name"], "parameters": value}
    return value
