"""Two kinds of bad input: a file or option that stops the command, and a row that goes to the quarantine."""

from __future__ import annotations


class DataError(ValueError):
    """The command cannot go on; the message says what, where and how to mend it."""


class RowError(ValueError):
    """One row cannot be used: the reason written to ``quarantine.jsonl``, and what mends it (an option, a command)."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason
