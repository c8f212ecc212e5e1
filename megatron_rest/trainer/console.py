"""What a person sees while a run goes on: progress with time left, one line a step, a summary at the end.

On a terminal progress is a tqdm bar.  Elsewhere (torchrun, Slurm and NeMo-Run read logs line by line) it is a plain
line every few seconds: no carriage returns, no colours, complete lines only.  Step lines have fixed columns under a
header that comes back every 20 lines; a metric that a step does not have is ``-``, one that is not finite stands out.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

from tqdm import tqdm

from megatron_rest.analysis.series import REGIONS, load_runs
from megatron_rest.analysis.summary import duration, summary_lines

if TYPE_CHECKING:
    from megatron_rest.types import StepReport

__all__ = ["Console", "Progress", "fixed", "scientific", "step_columns"]

T = TypeVar("T")

WIDE = 160  # columns of the full step line
HEADER_EVERY = 20  # step lines between two headers
PLAIN_INTERVAL = 5.0  # seconds between two progress lines where there is no terminal
BOLD, RED, RESET = "\x1b[1m", "\x1b[1;31m", "\x1b[0m"
LEGEND = (
    "ok % = rollouts with valid format; mass % = share of the token weights; "
    "|dlogp| = mean |rollout - train log-prob|, nats; - = not measured"
)


class Progress(Protocol):
    """A long stage under way."""

    def update(self, n: int = 1) -> object:
        """``n`` more items are done."""


class Console:
    """Everything a run prints.  ``enabled=False`` prints nothing: ranks that do not report run the same code."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        enabled: bool = True,
        width: int | None = None,
        is_terminal: bool | None = None,
        plain_interval: float = PLAIN_INTERVAL,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._is_terminal = self._stream.isatty() if is_terminal is None else is_terminal
        self._colour = self._is_terminal and not os.environ.get("NO_COLOR")
        self._plain_interval = plain_interval
        if width is None:
            width = shutil.get_terminal_size((WIDE, 24)).columns if self._is_terminal else WIDE
        self._width = width
        self._columns = step_columns(width)
        self._num_step_lines = 0

    def line(self, text: str = "") -> None:
        """Print one complete line, above a progress bar if there is one."""
        if not self._enabled:
            return
        if self._is_terminal:
            tqdm.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def progress(
        self, description: str, *, total: int | None = None, unit: str = "it", plain_interval: float | None = None
    ) -> AbstractContextManager[Progress]:
        """A long stage of ``total`` items: ``with console.progress("rollouts", total=512) as p: ... p.update()``.

        ``plain_interval``: seconds between its lines where there is no terminal; longer if the stage prints lines too.
        """
        if self._is_terminal and self._enabled:
            return tqdm(total=total, desc=description, unit=unit, file=self._stream, dynamic_ncols=True, leave=True)
        interval = self._plain_interval if plain_interval is None else plain_interval
        return _plain_progress(self.line, description, total, unit, interval)

    def track(self, items: Iterable[T], description: str, *, total: int | None = None, unit: str = "it") -> Iterator[T]:
        """Iterate over ``items`` with progress."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.progress(description, total=total, unit=unit) as progress:
            for item in items:
                yield item
                progress.update()

    def step(self, report: StepReport) -> None:
        """Print the line of one step, and the header when it is due."""
        if self._num_step_lines == 0:
            for text in textwrap.wrap(LEGEND, self._width):
                self.line(text)
        if self._num_step_lines % HEADER_EVERY == 0:
            for text in _header(self._columns):
                self.line(self._painted(text, BOLD))
        self._num_step_lines += 1
        values = {"step": float(report.step), **report.metrics, **_shares(report.metrics)}
        values |= {f"seconds/{phase}": seconds for phase, seconds in report.seconds.items()}
        cells = []
        for column in self._columns:
            value = values.get(column.metric)
            text = column.text(None if value is None else float(value))
            broken = value is not None and not math.isfinite(value)
            cells.append(" " * column.gap + (self._painted(text, RED) if broken else text))
        self.line("".join(cells))

    def summary(
        self,
        run_dir: str | Path,
        *,
        peak_memory_bytes: int | None = None,
        files: Mapping[str, str | Path] | None = None,
    ) -> None:
        """Print the table of the whole run, read back from its ``metrics.jsonl``."""
        if self._enabled:
            [run] = load_runs([run_dir])
            for text in summary_lines(run, peak_memory_bytes=peak_memory_bytes, files=files):
                self.line(text)

    def _painted(self, text: str, code: str) -> str:
        return f"{code}{text}{RESET}" if self._colour else text


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of the step line."""

    metric: str  # name in StepReport.metrics, "seconds/{phase}" or "share/{region}"
    title: str
    group: str  # title over neighbouring columns
    width: int
    decimals: int  # -1 = scientific
    scale: float = 1.0
    gap: int = 1  # blanks before the column

    def text(self, value: float | None) -> str:
        if value is None:
            return "-".rjust(self.width)
        if self.decimals < 0:
            return scientific(value * self.scale, self.width)
        return fixed(value * self.scale, self.width, self.decimals)


def step_columns(width: int) -> tuple[Column, ...]:
    """The full line (160 columns), or for a narrower terminal the same without the single phases (100 columns)."""
    wide = width >= WIDE
    columns = [Column(metric="step", title="step", group="", width=5, decimals=0, gap=0)]

    def add(group: str, items: Iterable[tuple[str, str]], width: int, decimals: int, scale: float = 1.0) -> None:
        for title, metric in items:
            starts = columns[-1].group != group
            gap = 2 if wide and starts else 1
            columns.append(
                Column(metric=metric, title=title, group=group, width=width, decimals=decimals, scale=scale, gap=gap)
            )

    names = dict(zip(REGIONS, ("fmt", "name", "args", "think", "resp"), strict=True))
    short = dict(
        zip(
            REGIONS,
            ("fmt", "name", "args", "thnk", "resp") if wide else ("fm", "nam", "arg", "thk", "rsp"),
            strict=True,
        )
    )
    rewards = [("total", "reward/total"), ("fmt", "reward/format"), ("corr", "reward/correctness")]
    add("reward", rewards, 6 if wide else 5, 3)
    add("resp.", [("ok %", "reward/format_valid")], 4, 1, 100.0)
    add("resp.", [("len", "response/length")], 5 if wide else 4, 0)
    entropies = [(names[r] if wide else short[r], f"entropy/{r}") for r in REGIONS]
    add("entropy, nats", entropies, 5 if wide else 4, 3)
    add("weight mass, %", [(short[r], f"share/{r}") for r in REGIONS], 4 if wide else 3, 1, 100.0)
    add("policy", [("|dlogp|", "mismatch/abs_log_prob_mean")], 7, -1)
    add("policy", [("grad", "optimizer/grad_norm")], 5, 3)
    if wide:
        add("seconds", [("roll", "seconds/rollout")], 5, 2)
        add("seconds", [("rewd", "seconds/reward")], 4, 2)
        add("seconds", [("score", "seconds/score")], 5, 2)
        add("seconds", [("wght", "seconds/weights")], 4, 2)
        add("seconds", [("upd", "seconds/update")], 5, 2)
        add("seconds", [("sync", "seconds/sync"), ("ckpt", "seconds/checkpoint")], 4, 2)
    add("seconds" if wide else "secs", [("total", "seconds/total")], 5, 1)
    return tuple(columns)


def fixed(value: float, width: int, decimals: int) -> str:
    """``value`` in exactly ``width`` characters, with as many of ``decimals`` as fit; huge numbers become 3e12."""
    if not math.isfinite(value):
        return str(value).rjust(width)
    for digits in range(decimals, -1, -1):
        text = f"{value:.{digits}f}"
        if float(text) == 0:
            text = text.lstrip("-")
        if len(text) <= width:
            return text.rjust(width)
    return scientific(value, width)


def scientific(value: float, width: int) -> str:
    """``0.000012`` -> ``1.2e-5``."""
    if not math.isfinite(value) or value == 0:
        return (str(value) if value else "0").rjust(width)
    for digits in (2, 1, 0):
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
        if len(text) <= width:
            break
    return text.rjust(width)


def _header(columns: Iterable[Column]) -> tuple[str, str]:
    """Two lines: group titles over rules, column titles."""
    top = ""
    bottom = ""
    for group, items in groupby(columns, key=lambda c: c.group):
        first, *_ = members = list(items)
        titles = "".join(" " * c.gap + c.title.rjust(c.width) for c in members)
        bottom += titles
        top += " " * first.gap + (f" {group} ".center(len(titles) - first.gap, "-") if group else "".ljust(len(titles)))
    return top.rstrip(), bottom


def _shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """Weight mass of each region as a share of all; regions without tokens are left out."""
    masses = {
        region: float(metrics[f"weight_mass/{region}"]) for region in REGIONS if f"weight_mass/{region}" in metrics
    }
    total = math.fsum(masses.values())
    return {f"share/{region}": mass / total if total else math.nan for region, mass in masses.items()}


class _PlainProgress:
    def __init__(
        self, write: Callable[[str], None], description: str, total: int | None, unit: str, interval: float
    ) -> None:
        self._write, self._description, self._total, self._unit = write, description, total, unit
        self._interval = interval
        self._started = self._last = time.monotonic()
        self._done = 0

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._write(self._text(now - self._started))

    def finish(self, *, failed: bool) -> None:
        short = self._total is not None and self._done < self._total
        state = "failed" if failed else "stopped early" if short else "done"
        self._write(f"{self._text(time.monotonic() - self._started, left=False)}, {state}")

    def _text(self, elapsed: float, *, left: bool = True) -> str:
        share = f"/{self._total} ({100 * self._done / self._total:.0f} %)" if self._total else ""
        rate = self._done / elapsed if elapsed > 0 else 0.0
        text = f"{self._description}: {self._done}{share} {self._unit}, {rate:.3g}/s, {duration(elapsed)}"
        if left and self._total and rate > 0:
            text += f", {duration(max(self._total - self._done, 0) / rate)} left"
        return text


@contextmanager
def _plain_progress(
    write: Callable[[str], None], description: str, total: int | None, unit: str, interval: float
) -> Iterator[_PlainProgress]:
    progress = _PlainProgress(write, description, total, unit, interval)
    try:
        yield progress
    except BaseException:
        progress.finish(failed=True)
        raise
    progress.finish(failed=False)
