"""Errors that end a run and need no traceback: the message says what, where and how to go on."""

from __future__ import annotations

__all__ = ["RunError", "described"]

_MOST = 500  # characters of a message


class RunError(RuntimeError):
    """The run cannot go on.  Shown as one line; exit status 1."""

    is_on_every_rank = True
    """All ranks raise it together, so one of them says it."""


def described(error: BaseException) -> str:
    """Type and text of what foreign code raised, in one bounded piece, whatever its ``__str__`` does."""
    try:
        text = f"{error}"
    except Exception as failure:  # noqa: BLE001  that is foreign code, too
        text = f"its text cannot be shown ({type(failure).__name__})"
    return f"{type(error).__name__}: {text[:_MOST]}{' ...' if len(text) > _MOST else ''}"
