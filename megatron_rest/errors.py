"""Errors that end a run and need no traceback: the message says what, where and how to go on."""

from __future__ import annotations

__all__ = ["RunError"]


class RunError(RuntimeError):
    """The run cannot go on.  Shown as one line; exit status 1."""

    is_on_every_rank = True
    """All ranks raise it together, so one of them says it."""
