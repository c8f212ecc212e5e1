"""Split a prepared folder by a hash of the prompt or of its tools: what is equal stays on one side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.encode import Refused
from data_tools.errors import DataError
from data_tools.folders import PreparedFolder, keep_rows, lists, write_subset


def parse_parts(texts: Sequence[str]) -> dict[str, float]:
    """``["train=0.9", "test=0.1"]`` as a mapping; the fractions must add up to 1."""
    parts: dict[str, float] = {}
    for text in texts:
        name, equals, fraction = text.partition("=")
        try:
            value = float(fraction)
        except ValueError:
            value = -1.0
        if not equals or not 0 < value <= 1 or name in parts or Path(name).name != name or name in ("", ".", ".."):
            raise DataError(f"part {text!r} is not of the form NAME=FRACTION, for example test=0.02")
        parts[name] = value
    if abs(sum(parts.values()) - 1) > 1e-6:
        raise DataError(f"the parts add up to {sum(parts.values()):g}, expected 1: {', '.join(texts)}")
    return parts


def split_folder(
    path: str | Path, output: Path, parts: dict[str, float], *, seed: int, by: str = "prompt", overwrite: bool = False
) -> dict[str, int]:
    """Write ``output/NAME`` for every part; returns their row counts, which add up to the input's.

    ``by``: what stays together: ``prompt``, or ``tools``, the names of the tools on offer.
    """
    source = PreparedFolder(path)
    bounds = np.cumsum(list(parts.values()))
    bounds[-1] = 1.0
    counts = {}
    for index, (name, fraction) in enumerate(parts.items()):
        operation: dict[str, Any] = {
            "command": "split",
            "part": name,
            "fraction": fraction,
            "parts": parts,
            "seed": seed,
            "by": by,
        }
        chunks = _part(source, bounds, index, seed, by)
        manifest = write_subset(source, output / name, chunks, operation=operation, overwrite=overwrite)
        counts[name] = manifest["counts"]["rows_out"]
    if sum(counts.values()) != source.num_rows:
        raise AssertionError(f"rows do not add up: {counts} of {source.num_rows}")
    return counts


def _part(
    source: PreparedFolder, bounds: np.ndarray, index: int, seed: int, by: str
) -> Iterator[tuple[pa.RecordBatch, list[Refused]]]:
    for batch in source.batches():
        parts = np.searchsorted(bounds, fractions(batch, seed, by=by), side="right")
        yield keep_rows(batch, parts == index), []


def fractions(batch: pa.RecordBatch, seed: int, *, by: str = "prompt") -> np.ndarray:
    """A number in [0, 1) for every row that depends on its prompt (or its tools' names) and the seed only.

    A row without tools goes by its prompt.
    """
    offsets, values = lists(batch, "prompt_token_ids")
    tools = batch.column("tools").to_pylist() if by == "tools" else ["[]"] * batch.num_rows
    found = np.empty(batch.num_rows)
    for row in range(batch.num_rows):
        names = sorted({str(tool["name"]) for tool in json.loads(tools[row])})
        key = json.dumps(names).encode() if names else values[offsets[row] : offsets[row + 1]].tobytes()
        digest = hashlib.blake2b(key, key=str(seed).encode(), digest_size=6)
        found[row] = int.from_bytes(digest.digest(), "little") / (1 << 48)
    return found
