"""What every benchmark is made of: cases with a prompt and a rule, and scores that say what was wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["CORRECT", "Answer", "EvalCase", "Score"]

CORRECT = "correct"

Answer = str | list[list[str]]
"""A text, or what a model said in a conversation: a list for each turn of the user, the model's texts in it."""


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
    score: Callable[[Any], Score]  # of an Answer: with an environment a conversation, else a text
    environment: str = ""  # what the model talks to (as rollout.environment); empty: it answers once
    task: str = ""  # how that environment finds the case
    # The same question where the chat template shows tools in the model's own dialect; none: ``messages`` ask for tags.
    native_messages: tuple[dict[str, str], ...] = ()
    native_tools: tuple[dict[str, Any], ...] = ()

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """``{tool: {parameter: JSON schema}}`` of the native tools."""
        functions = [tool["function"] for tool in self.native_tools]
        return {f["name"]: f["parameters"].get("properties", {}) for f in functions}
