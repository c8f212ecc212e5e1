"""What a tracker is.

    def factory(run: TrackedRun, **arguments) -> Tracker        trainer.loggers: package.module:factory

Factory and methods are called in one thread of the tracker's own, in the order of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["TrackedRun", "Tracker", "TrackerFactory"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a tracker is told about a run when it starts."""

    name: str
    """The run folder's last name."""
    run_dir: Path
    config: Mapping[str, Any]
    """The whole configuration, by section; ``code`` says the commit, ``user_code`` the user's own code."""
    after_step: int = 0
    """Where this start begins; steps after it may have been told by an earlier one that was killed."""
    run_id: str | None = None
    """What :attr:`Tracker.run_id` was in an earlier start of this run: continue that one."""
    tags: tuple[str, ...] = field(default=("megatron_rest",))


class Tracker(Protocol):
    """One run at one tracker.  Anything may raise: it is warned of once and counted, and the run goes on."""

    @property
    def run_id(self) -> str:
        """By which the same run is found again."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step, and ``seconds/PHASE``; numbers that are not finite are left out."""
        ...

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        """A table of a step: sample rollouts."""
        ...

    def picture(self, name: str, path: Path) -> None:
        """A PNG file."""
        ...

    def close(self, *, is_finished: bool) -> None:
        """The process ends; ``is_finished``: and so does the run."""
        ...


TrackerFactory = Callable[..., Tracker]
