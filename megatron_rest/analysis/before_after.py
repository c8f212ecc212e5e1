"""Two policies on the same prompts, side by side: what ``prompt_sets --compare`` writes and reports show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rest.analysis.series import MetricsFileError
from megatron_rest.analysis.summary import table_lines

__all__ = ["COMPARED_FILE", "Answer", "Compared", "Example", "Measure", "as_json", "read_compared"]

COMPARED_FILE = "prompt_sets_compared.json"
_WORDS = {"format_valid": "valid format (share)", "accuracy": "accuracy (0 to 1)", "length": "answer (tokens)"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Means over prompts, and the 95 % interval of their difference over prompts."""

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer in runs of one region."""

    reward: float
    accuracy: float
    regions: Sequence[tuple[str, int]]  # (text, TokenRegion)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """The first answers of both policies to one prompt."""

    prompt: str
    before: Answer
    after: Answer

    @classmethod
    def of_rows(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> Example:
        """From the rows of two ``prompt_sets.json``."""
        answers = [
            Answer(reward=row["reward"][0], accuracy=row["accuracy"][0], regions=row["first_answer_regions"])
            for row in (before, after)
        ]
        return cls(prompt=before["prompt"], before=answers[0], after=answers[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One set of prompts."""

    name: str
    prompts: int
    answers: int  # to each prompt
    measures: Sequence[Measure]
    examples: Sequence[Example]

    def lines(self) -> list[str]:
        """A table for people."""
        rows = [
            [
                _WORDS.get(m.name, m.name),
                f"{m.before:.3f}",
                f"{m.after:.3f}",
                f"{m.difference:+.3f} ({m.low:+.3f} to {m.high:+.3f})",
            ]
            for m in self.measures
        ]
        header = [f"{self.name}: {self.prompts} prompts x {self.answers} answers", "before", "after", "change, 95 %"]
        return table_lines(header, rows)


def as_json(sets: Sequence[Compared]) -> list[dict[str, Any]]:
    """What :func:`read_compared` reads."""
    return [asdict(compared) for compared in sets]


def read_compared(run_dir: str | Path) -> list[Compared]:
    """The comparison in a run's folder; nothing if there is none.  MetricsFileError for one that cannot be read."""
    path = Path(run_dir) / COMPARED_FILE
    if not path.is_file():
        return []
    try:
        return [_compared(values) for values in json.loads(path.read_text(encoding="utf-8"))["sets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MetricsFileError(f"{path} is no comparison of policies: {error!r}") from error


def _compared(values: Mapping[str, Any]) -> Compared:
    examples = [
        Example(prompt=str(e["prompt"]), before=Answer(**e["before"]), after=Answer(**e["after"]))
        for e in values["examples"]
    ]
    return Compared(**{**values, "measures": [Measure(**m) for m in values["measures"]], "examples": examples})
