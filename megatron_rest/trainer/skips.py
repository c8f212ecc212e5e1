"""Updates that were skipped because something was not finite: said, counted, and the end of the run after too many."""

from __future__ import annotations

import logging

from megatron_rest.errors import RunError
from megatron_rest.help_topics import Topic, see
from megatron_rest.mcore.policy import UpdateReport

__all__ = ["NonFiniteError", "SkipCount"]

_log = logging.getLogger(__name__)


class NonFiniteError(RunError):
    """Too many updates in a row had a loss or a gradient that is not finite."""


class SkipCount:
    """Counts skipped updates in a row.

    Args:
        limit: so many are let pass (``optimizer.max_skipped``).
        is_reporting: this rank says it; the count is the same on all.
    """

    def __init__(self, limit: int, *, is_reporting: bool) -> None:
        self.limit = limit
        self.in_a_row = 0
        self._is_reporting = is_reporting

    def note(self, report: UpdateReport, *, where: str) -> None:
        """Take what an update said; ``where`` names it for people.  Raises :class:`NonFiniteError` above the limit."""
        if not report.nonfinite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        what = ", ".join(report.nonfinite)
        if self.in_a_row > self.limit:
            raise NonFiniteError(
                f"{where}: not finite: {what}; {self.in_a_row} updates in a row were skipped (optimizer.max_skipped "
                f"{self.limit}). Weights are those of the last update that was not; lower optimizer.lr or look at the "
                f"data of this step, then start again from a checkpoint{see(Topic.NOT_FINITE)}"
            )
        if self._is_reporting:
            _log.warning(
                "%s skipped, weights unchanged (%d in a row): not finite: %s%s",
                where,
                self.in_a_row,
                what,
                see(Topic.NOT_FINITE),
            )
