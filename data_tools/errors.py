"""Two kinds of bad input: a file or option that stops the command, and a row that goes to the quarantine."""

from __future__ import annotations


class DataError(ValueError):
    """The command cannot go on; the message says what, where and how to mend it."""


class RowError(ValueError):
    """One row cannot be used; the message is the reason written to ``quarantine.jsonl``."""
