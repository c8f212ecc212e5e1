"""What every benchmark is made of: cases with a prompt and a rule, and scores that say what was wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CORRECT", "EvalCase", "Score"]

CORRECT = "correct"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One judged answer."""

    is_correct: bool
    outcome: str  # CORRECT or the kind of error, a short name that can be counted
    detail: str = ""  # what exactly, for people
    is_soft_correct: bool | None = None  # the benchmark's published, more lenient rule, where it has one


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalCase:
    """One question of a benchmark.

    EvalCase(case_id="level-1/0", category="level-1", messages=({"role": "system", ...}, {"role": "user", ...}), ...)
    """

    case_id: str  # unique in its benchmark
    category: str
    messages: tuple[dict[str, str], ...]  # what the chat template renders; ends with a user's message
    score: Callable[[str], Score]  # the answer's text, end-of-turn marker or not
