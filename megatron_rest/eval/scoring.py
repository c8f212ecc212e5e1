"""Answers to scores: one file of answers in (``answers.py``), one file of verdicts and one summary out.

    RUN/verdicts.jsonl    {"case_id", "category", "is_correct", ...}   one line a case, in the benchmark's order
    RUN/summary.json      counts, accuracies with intervals, kinds of errors, by category

A case without an answer counts as wrong and is named: a run that stopped early must not look better than it was.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rest.analysis.statistics import wilson_interval
from megatron_rest.eval.cases import Answer, EvalCase, Score
from megatron_rest.eval.decontamination import decontamination_lines

__all__ = [
    "Verdict",
    "judge",
    "read_verdicts",
    "summarise",
    "summary_lines",
    "write_json",
    "write_lines",
    "write_scores",
    "write_text",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The score of one case."""

    case_id: str
    category: str
    score: Score


def judge(cases: Sequence[EvalCase], answers: Mapping[str, Answer]) -> list[Verdict]:
    """Verdicts in the order of the cases.  Answers to cases that are not among them are an error of the caller."""
    unknown = sorted(answers.keys() - {case.case_id for case in cases})
    if unknown:
        raise ValueError(
            f"{len(unknown)} answers are to cases that were not asked for, such as {unknown[0]!r}: other categories?"
        )
    for case in cases:
        if case.case_id in answers and isinstance(answers[case.case_id], str) == bool(case.environment):
            wanted = "a conversation: texts by turn of the user" if case.environment else "one text"
            raise ValueError(f"the answer to case {case.case_id!r} must be {wanted}")
    return [
        Verdict(
            case_id=case.case_id,
            category=case.category,
            score=case.score(answers[case.case_id]) if case.case_id in answers else _no_answer(case),
        )
        for case in cases
    ]


def _no_answer(case: EvalCase) -> Score:
    """Wrong in every score that the case has, and also where silence would be right."""
    has_soft = not case.environment and case.score("").is_soft_correct is not None
    return Score(
        is_correct=False,
        outcome="no answer",
        detail="the file of answers has no line for this case",
        is_soft_correct=False if has_soft else None,
    )


def summarise(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts, accuracy with its interval and kinds of errors, in all and by category."""
    categories: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        categories.setdefault(verdict.category, []).append(verdict)
    return {"all": _summary(verdicts), "categories": {name: _summary(part) for name, part in categories.items()}}


def write_scores(folder: Path, benchmark: str, verdicts: Sequence[Verdict], **more: Any) -> dict[str, Any]:
    """``verdicts.jsonl`` and ``summary.json`` into ``folder``; returns the summary, in which ``more`` stands, too."""
    write_lines(folder / "verdicts.jsonl", [asdict(verdict) for verdict in verdicts])
    summary = {"benchmark": benchmark, **more, **summarise(verdicts)}
    write_json(folder / "summary.json", summary)
    return summary


def _summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    correct = sum(v.score.is_correct for v in verdicts)
    soft = [v.score.is_soft_correct for v in verdicts if v.score.is_soft_correct is not None]
    return {
        "cases": len(verdicts),
        "correct": correct,
        "accuracy": asdict(wilson_interval(correct, len(verdicts))),
        "soft_accuracy": asdict(wilson_interval(sum(soft), len(soft))) if soft else None,
        "outcomes": dict(Counter(v.score.outcome for v in verdicts).most_common()),
    }


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as a table for people."""
    rows = [*summary["categories"].items(), ("all", summary["all"])]
    lines = [f"{'category':<24}{'cases':>6}  {'accuracy':>8}  {'95 % interval':<16}{'soft':>7}  most frequent errors"]
    for name, part in rows:
        accuracy, soft = part["accuracy"], part["soft_accuracy"]
        wrong = [f"{outcome} {count}" for outcome, count in part["outcomes"].items() if outcome != "correct"][:3]
        interval = f"{accuracy['low']:.1%} to {accuracy['high']:.1%}"
        lines.append(
            f"{name:<24}{part['cases']:>6}  {accuracy['estimate']:>8.1%}  {interval:<16}"
            f"{format(soft['estimate'], '.1%') if soft else '-':>7}  {', '.join(wrong) or '-'}"
        )
    if summary.get("left_out"):
        lines.append(f"{len(summary['left_out'])} cases were not asked: their prompts are too long for the context")
    return [*lines, *decontamination_lines(summary.get("decontamination", []))]


def read_verdicts(folder: str | Path) -> dict[str, Verdict]:
    """``verdicts.jsonl`` of a run by case."""
    path = Path(folder) / "verdicts.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} holds no verdicts.jsonl: score it with `megatron-rest eval run` or `... score`")
    rows = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])  # texts may hold U+2028
    return {
        row["case_id"]: Verdict(case_id=row["case_id"], category=row["category"], score=Score(**row["score"]))
        for row in rows
    }


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """One JSON document, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """The whole file or none."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # a lone surrogate becomes its JSON escape
    os.replace(partial, path)
