"""Remove rows whose dialogue is (nearly) that of a benchmark's.

Both sides are reduced to the words of what the user and the dialogue say; system messages (tools, instructions) do not
count, tags and punctuation do not count.  A row is contaminated by a benchmark item if it contains at least
``min_overlap`` of the item's word n-grams.  Items shorter than n words count as one n-gram of their whole length.
N-grams that many items share ("please only make one tool call ...") are boilerplate and say nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.encode import Refused
from data_tools.errors import DataError, RowError
from data_tools.examples import normalise
from data_tools.folders import PreparedFolder, keep_rows, write_subset
from data_tools.readers import read_chunks, resolve_inputs
from data_tools.readers.sources import ALL_SPLITS

FEWEST_WORDS = 4  # "What time is it?" says nothing about where it comes from
BOILERPLATE_SHARE = 0.02
BOILERPLATE_ITEMS = 5
_TAG = re.compile(r"</?\w+>")
_WORD = re.compile(r"\w+")
Gram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """The benchmark item a row is too close to."""

    item: str
    overlap: float


@dataclass(slots=True)
class BenchmarkIndex:
    """N-grams of all benchmark items."""

    ngram: int
    min_overlap: float
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    items_of: dict[Gram, list[int]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    num_ignored: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)  # rows that are no items, by file; why the first is none
    first_unreadable: str = ""

    def find(self, text: str) -> Match | None:
        """The closest item, if it is close enough."""
        words, hits = words_of(text), Counter[int]()
        for length in self.lengths:
            for gram in grams(words, length):
                hits.update(self.items_of.get(gram, ()))
        best = max(hits, key=lambda item: (hits[item] / self.sizes[item], -item), default=None)
        if best is None or hits[best] / self.sizes[best] < self.min_overlap:
            return None
        return Match(self.names[best], hits[best] / self.sizes[best])


def words_of(text: str) -> list[str]:
    """Lower-case words without tags."""
    return _WORD.findall(_TAG.sub(" ", text).lower())


def grams(words: list[str], length: int) -> set[Gram]:
    """All distinct runs of ``length`` words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def build_index(paths: Sequence[str], *, ngram: int, min_overlap: float) -> BenchmarkIndex:
    """Read the benchmark files (any form; BFCL's ``question`` rows too)."""
    if ngram < FEWEST_WORDS or not 0 < min_overlap <= 1:
        raise DataError(
            f"--ngram must be at least {FEWEST_WORDS} and --min-overlap in (0, 1], got {ngram} and {min_overlap}"
        )
    index = BenchmarkIndex(ngram, min_overlap)
    items: list[tuple[str, set[Gram]]] = []
    for name, text in _benchmark_texts(paths, index):
        words = words_of(text)
        if len(words) < FEWEST_WORDS:
            index.num_ignored += 1
        else:
            items.append((name, grams(words, min(ngram, len(words)))))
    shared = Counter(gram for _, found in items for gram in found)
    limit = max(BOILERPLATE_ITEMS, BOILERPLATE_SHARE * len(items))
    items_of: defaultdict[Gram, list[int]] = defaultdict(list)
    for name, found in items:
        telling = {gram for gram in found if shared[gram] <= limit}
        if not telling:
            index.num_ignored += 1
            continue
        for gram in telling:
            items_of[gram].append(len(index.names))
        index.names.append(name)
        index.sizes.append(len(telling))
    index.items_of, index.lengths = dict(items_of), sorted({len(gram) for gram in items_of})
    return index


def _benchmark_texts(paths: Sequence[str], index: BenchmarkIndex) -> Iterator[tuple[str, str]]:
    """(name, dialogue) of every item; what is none, as a configuration file in a benchmark's folder, is counted."""
    usable = False
    for chunk in read_chunks(resolve_inputs(paths, split=ALL_SPLITS)):
        for number, row in chunk.rows():
            name = f"{chunk.source}:{number}"
            try:
                if isinstance(row, RowError):
                    raise row
                text = _dialogue(row)
            except RowError as error:
                index.unreadable[chunk.source] += 1
                index.first_unreadable = index.first_unreadable or f"{name}: {error.reason}"
                continue
            usable = True
            yield name, text
    if not usable:
        raise DataError(
            f"--against holds no benchmark item; the first row is {index.first_unreadable or 'missing'}: give files "
            "of a layout that convert reads, or with `question`"
        )


def _dialogue(row: Any) -> str:
    if isinstance(row, dict) and isinstance(row.get("question"), str):
        return str(row["question"])
    if isinstance(row, dict) and isinstance(row.get("question"), list):  # BFCL: turns of messages
        turns = [turn if isinstance(turn, list) else [turn] for turn in row["question"]]
        if all(isinstance(message, dict) for turn in turns for message in turn):
            return "\n".join(str(m.get("content", "")) for turn in turns for m in turn if m.get("role") != "system")
    return dialogue_text(normalise(row).messages)


def dialogue_text(messages: Sequence[dict[str, str]]) -> str:
    """What is said, without system messages."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def decontaminate_folder(
    path: str | Path, output: Path, index: BenchmarkIndex, *, against: Sequence[str], overwrite: bool = False
) -> dict[str, Any]:
    """Write the clean rows of a prepared folder; removed ones are listed, with the item, in its quarantine file."""
    operation = {
        "command": "decontaminate",
        "against": [Path(name).name for name in against],
        "benchmark_items": len(index.names),
        "benchmark_items_ignored": index.num_ignored,
        "ngram": index.ngram,
        "min_overlap": index.min_overlap,
    }
    source = PreparedFolder(path)
    return write_subset(source, output, _clean(source, index), operation=operation, overwrite=overwrite)


def _clean(source: PreparedFolder, index: BenchmarkIndex) -> Iterator[tuple[pa.RecordBatch, list[Refused]]]:
    for batch in source.batches():
        keep, removed = np.ones(batch.num_rows, dtype=bool), []
        for row, messages in enumerate(batch.column("messages").to_pylist()):
            match = index.find(dialogue_text(json.loads(messages)))
            if match:
                keep[row] = False
                removed.append(_removed(batch, row, match))
        yield keep_rows(batch, keep), removed


def _removed(batch: pa.RecordBatch, row: int, match: Match) -> Refused:
    values = {name: batch.column(name)[row].as_py() for name in ("source_file", "source_row", "prompt_id")}
    reason = f"too close to a benchmark item: {match.item} (overlap {match.overlap:.2f})"
    return Refused(values["source_file"], values["source_row"], reason, {"prompt_id": values["prompt_id"]})
