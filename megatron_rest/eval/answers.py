"""Stored answers: a line ``{"case_id", "answer"}`` each, appended while a model answers, whole lines only.

A process that is killed leaves whole lines and at most a half one at the end, which the next :class:`AnswerLog` cuts
off: what was answered is not asked again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rest.eval.cases import Answer

__all__ = ["ANSWERS_FILE", "AnswerLog", "read_answers"]

ANSWERS_FILE = "answers.jsonl"
_FLUSH_SECONDS = 1.0  # answers of this long are lost when the machine goes down; a sync each would slow generation


class AnswerLog:
    """Appends answers to a file; use it as a context.

    ``known`` holds the answers that were there before, by case.  Raises ValueError for a file that is no file of
    answers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                os.truncate(self.path, len(whole))
        self.known = read_answers(self.path) if self.path.exists() else {}
        self._file = open(self.path, "ab")  # noqa: SIM115  closed by __exit__
        self._last_flush = time.monotonic()

    def add(self, case_id: str, answer: Answer, **more: Any) -> None:
        """One line; on disk within about a second, or at the end of the context."""
        line = json.dumps({"case_id": case_id, "answer": answer, **more}, ensure_ascii=False) + "\n"
        self._file.write(line.encode("utf-8", "backslashreplace"))
        if time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self._sync()

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last_flush = time.monotonic()


def read_answers(path: str | Path) -> dict[str, Answer]:
    """``{case_id: answer}`` of a file of answers; a case answered twice is an error, since one would be dropped."""
    answers: dict[str, Answer] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            case_id, answer = row["case_id"], row["answer"]
            if not isinstance(case_id, str) or not _is_answer(answer):
                raise TypeError("case_id must be text, answer text or a list of lists of texts")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not an answer ({type(error).__name__}: {error})") from error
        if case_id in answers:
            raise ValueError(f"{path}, line {number}: case {case_id!r} is answered twice")
        answers[case_id] = answer
    return answers


def _is_answer(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(turn, list) and all(isinstance(text, str) for text in turn) for turn in value)
    return isinstance(value, str)
