"""What a prepared folder holds, in numbers and pictures."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.errors import DataError
from data_tools.folders import PreparedFolder, lists

PERCENTILES = (0, 50, 90, 99, 100)
LISTED = 20  # duplicates and over-long prompts named on the terminal; the JSON names them all
_BAR = 40


@dataclass(slots=True)
class Stats:
    """Counts over all rows."""

    num_rows: int = 0
    prompt_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    answer_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    calls_per_row: Counter[int] = field(default_factory=Counter)
    tools_per_row: Counter[int] = field(default_factory=Counter)
    duplicates: list[dict[str, Any]] = field(default_factory=list)
    num_duplicate_prompts: int = 0
    over_long: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "rows": self.num_rows,
            "prompt_tokens": _percentiles(self.prompt_tokens),
            "answer_tokens": _percentiles(self.answer_tokens),
            "calls_per_row": {str(key): value for key, value in sorted(self.calls_per_row.items())},
            "tools_per_row": {str(key): value for key, value in sorted(self.tools_per_row.items())},
            "duplicate_rows": len(self.duplicates),
            "rows_with_a_repeated_prompt": self.num_duplicate_prompts,
            "duplicates": self.duplicates,
            "over_long": self.over_long,
        }


def measure(path: str | Path, *, max_prompt_tokens: int = 0) -> Stats:
    """Read a prepared folder once; over-long prompts are listed, never cut."""
    stats = Stats()
    prompt_lengths, answer_lengths = [], []
    first_seen: dict[str, tuple[str, int]] = {}
    prompts_seen: Counter[int] = Counter()
    for batch in PreparedFolder(path).batches():
        stats.num_rows += batch.num_rows
        offsets, values = lists(batch, "prompt_token_ids")
        prompt_lengths.append(np.diff(offsets))
        answer_lengths.append(np.diff(lists(batch, "answer_token_ids")[0]))
        stats.duplicates += _duplicates(batch, first_seen)
        prompts_seen.update(hash(values[a:b].tobytes()) for a, b in itertools.pairwise(offsets))
        stats.calls_per_row.update(len(json.loads(text)) for text in batch.column("calls").to_pylist())
        stats.tools_per_row.update(len(json.loads(text)) for text in batch.column("tools").to_pylist())
        if max_prompt_tokens:
            stats.over_long += _over_long(batch, prompt_lengths[-1], max_prompt_tokens)
    stats.prompt_tokens = np.concatenate(prompt_lengths) if prompt_lengths else stats.prompt_tokens
    stats.answer_tokens = np.concatenate(answer_lengths) if answer_lengths else stats.answer_tokens
    stats.num_duplicate_prompts = stats.num_rows - len(prompts_seen)
    return stats


def _duplicates(batch: pa.RecordBatch, first_seen: dict[str, tuple[str, int]]) -> list[dict[str, Any]]:
    """Rows whose content has been seen before, and where."""
    found = []
    for name, file, row in zip(
        *(batch.column(column).to_pylist() for column in ("prompt_id", "source_file", "source_row")), strict=True
    ):
        first_file, first_row = first_seen.setdefault(name, (file, row))
        if (first_file, first_row) != (file, row):
            found.append({"file": file, "row": row, "same_as_file": first_file, "same_as_row": first_row})
    return found


def _over_long(batch: pa.RecordBatch, lengths: np.ndarray, limit: int) -> list[dict[str, Any]]:
    rows = np.flatnonzero(lengths > limit)
    return [
        {
            "file": batch.column("source_file")[int(row)].as_py(),
            "row": batch.column("source_row")[int(row)].as_py(),
            "prompt_tokens": int(lengths[row]),
        }
        for row in rows
    ]


def _percentiles(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {}
    named = {f"p{p}": float(np.percentile(lengths, p)) for p in PERCENTILES}
    return {"mean": round(float(lengths.mean()), 1), **named}


def describe(stats: Stats, *, max_prompt_tokens: int = 0) -> str:
    """The report for the terminal."""
    lines = [
        f"{stats.num_rows} rows: {len(stats.duplicates)} exact duplicates, "
        f"{stats.num_duplicate_prompts} prompts repeated"
    ]
    lines += _listed(
        [f"{e['file']} row {e['row']} = {e['same_as_file']} row {e['same_as_row']}" for e in stats.duplicates]
    )
    for name, lengths in (("prompt tokens", stats.prompt_tokens), ("answer tokens", stats.answer_tokens)):
        lines += ["", name + "  " + "  ".join(f"{key} {value:g}" for key, value in _percentiles(lengths).items())]
        lines += _bars(lengths)
    lines += ["", "calls per row   " + _counts(stats.calls_per_row), "tools per row   " + _counts(stats.tools_per_row)]
    if max_prompt_tokens:
        lines += ["", f"{len(stats.over_long)} prompts are longer than {max_prompt_tokens} tokens"]
        lines += _listed([f"{e['file']} row {e['row']}: {e['prompt_tokens']}" for e in stats.over_long])
    return "\n".join(lines)


def _listed(entries: list[str]) -> list[str]:
    more = len(entries) - LISTED
    return [f"  {entry}" for entry in entries[:LISTED]] + (
        [f"  ... and {more} more (--json lists all)"] if more > 0 else []
    )


def _counts(counter: Counter[int]) -> str:
    return "  ".join(f"{key}: {value}" for key, value in sorted(counter.items()))


def _bars(lengths: np.ndarray, bins: int = 10) -> list[str]:
    if not len(lengths):
        return []
    counts, edges = np.histogram(lengths, bins=min(bins, int(lengths.max() - lengths.min()) + 1))
    widths = np.ceil(counts / max(counts.max(), 1) * _BAR).astype(int)
    return [f"  {edges[i]:8.0f} - {edges[i + 1]:8.0f} {'█' * widths[i]} {counts[i]}" for i in range(len(counts))]


def plot(stats: Stats, path: Path, *, title: str, limits: Sequence[int] = ()) -> None:
    """Histograms of prompt and answer lengths as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("--png needs the package matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, (name, lengths, colour) in zip(
        figure.subplots(1, 2),
        (("prompt tokens", stats.prompt_tokens, "#31688e"), ("answer tokens", stats.answer_tokens, "#35b779")),
        strict=True,
    ):
        axes.hist(lengths, bins=min(50, max(len(np.unique(lengths)), 1)), color=colour)
        axes.set_xlabel(name)
        axes.set_ylabel("rows")
        for limit in limits if name == "prompt tokens" else ():
            axes.axvline(limit, color="#d62728", linestyle="--", label=f"limit {limit}: {len(stats.over_long)} longer")
            axes.legend()
    figure.suptitle(f"{title}: {stats.num_rows} rows")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
