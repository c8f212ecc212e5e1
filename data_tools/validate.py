"""Check a prepared folder in full, or raw rows without writing anything.  Findings are sentences; none means good."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.chat import ChatTokenizer
from data_tools.encode import EncodeOptions, check_reference, examples_of_row, kind_of, prepare
from data_tools.errors import DataError, RowError
from data_tools.examples import Example
from data_tools.folders import PreparedFolder, lists
from data_tools.readers import read_chunks, resolve_inputs
from data_tools.writer import sha256_file
from megatron_rest.regions import TOOLRL, Dialect, answer_prefix, find_dialect, is_thought_open, region_spans

MOST_FINDINGS = 50


def validate_prepared(path: str | Path, *, tokenizer: ChatTokenizer | None = None) -> Iterator[str]:
    """Everything that can be wrong with a folder ``convert`` wrote."""
    folder = PreparedFolder(path)
    yield from _check_counts(folder)
    damaged = list(_check_files(folder))
    yield from damaged
    if tokenizer is not None:
        yield from _check_identity(folder, tokenizer)
    if damaged:
        return  # rows of a damaged file say nothing new
    row = 0
    dialect, opened = _dialect(folder)
    for batch in folder.batches():
        yield from _check_rows(batch, row, tokenizer, dialect, opened)
        row += batch.num_rows


def open_as_prepared(path: str | Path, tokenizer: Path) -> ChatTokenizer:
    """The tokenizer with the dialect and the template that the folder was prepared with."""
    folder = PreparedFolder(path)
    template = str(folder.manifest.get("tokenizer", {}).get("chat_template", "stock"))
    return ChatTokenizer(tokenizer, dialect=_dialect(folder)[0], template=template)


def open_for_raw(paths: Sequence[str], tokenizer: Path, options: EncodeOptions, split: str) -> ChatTokenizer:
    """The tokenizer with the dialect that ``convert`` would take for these rows."""
    from data_tools.convert import ConvertOptions, with_dialect

    wanted = ConvertOptions(inputs=list(paths), output=Path(), tokenizer=tokenizer, encode=options, split=split)
    return with_dialect(wanted, resolve_inputs(paths, split=split)).open_tokenizer()


def _dialect(folder: PreparedFolder) -> tuple[Dialect, bool]:
    """The dialect of a prepared folder, and whether its prompts have opened the thought."""
    made = folder.manifest.get("tokenizer", {})
    try:
        dialect = find_dialect(str(made.get("dialect", TOOLRL.name)))
    except ValueError as error:
        raise DataError(f"{folder.path}: {error}") from error
    prefix = answer_prefix(str(made.get("generation_prompt", "")).encode(), dialect)
    return dialect, is_thought_open(prefix, dialect)


def _check_counts(folder: PreparedFolder) -> Iterator[str]:
    counts = folder.manifest.get("counts", {})
    total, out, refused = (counts.get(key) for key in ("rows_in", "rows_out", "rows_quarantined"))
    if not all(isinstance(n, int) for n in (total, out, refused)) or total != out + refused:
        yield f"manifest: rows in ({total}) are not rows out ({out}) + quarantined ({refused})"
    if out != folder.num_rows:
        yield f"manifest: rows out is {out}, its files hold {folder.num_rows}"


def _check_files(folder: PreparedFolder) -> Iterator[str]:
    entries = [*folder.manifest["outputs"], folder.manifest.get("quarantine") or {}]
    for entry in entries:
        if not entry:
            yield "manifest: the quarantine file is not named"
            continue
        path = folder.path / entry["name"]
        if not path.is_file():
            yield f"{entry['name']} is missing"
        elif sha256_file(path) != entry.get("sha256"):
            yield f"{entry['name']} was changed: its sha256 is not that of the manifest"
    quarantine = folder.path / str((folder.manifest.get("quarantine") or {}).get("name", ""))
    if quarantine.is_file():
        lines = quarantine.read_bytes().count(b"\n")
        stated = folder.manifest.get("counts", {}).get("rows_quarantined")
        if lines != stated:
            yield f"{quarantine.name} holds {lines} rows, the manifest says {stated}"


def _check_identity(folder: PreparedFolder, tokenizer: ChatTokenizer) -> Iterator[str]:
    stored = folder.manifest.get("tokenizer", {})
    if stored.get("identity") != tokenizer.identity:
        yield f"prepared with another tokenizer than {tokenizer.folder}"
    if stored.get("chat_template_identity") != tokenizer.template_identity:
        yield f"prepared with another chat template than {tokenizer.folder}"


def _check_rows(
    batch: pa.RecordBatch, first: int, tokenizer: ChatTokenizer | None, dialect: Dialect, opened: bool
) -> Iterator[str]:
    prompt_offsets, prompt_ids = lists(batch, "prompt_token_ids")
    answer_offsets, answer_ids = lists(batch, "answer_token_ids")
    size = tokenizer.vocab_size if tokenizer else np.iinfo(np.int32).max
    for row, values in enumerate(batch.to_pylist()):
        where = f"row {first + row} ({values['source_file']} row {values['source_row']})"
        prompt = prompt_ids[prompt_offsets[row] : prompt_offsets[row + 1]]
        answer = answer_ids[answer_offsets[row] : answer_offsets[row + 1]]
        for name, ids in (("prompt", prompt), ("answer", answer)):
            if not len(ids):
                yield f"{where}: the {name} has no tokens"
            elif ids.min() < 0 or ids.max() >= size:
                yield f"{where}: the {name} has token ids outside the vocabulary of {size}"
        starts = values["answer_token_starts"]
        if starts is not None and (len(starts) != len(answer) or np.any(np.diff(starts) < 0)):
            yield f"{where}: answer_token_starts does not fit answer_token_ids"
        if not any(_has_regions(values, dialect, o) for o in _may_be_open(prompt, tokenizer, dialect, opened)):
            yield f"{where}: the stored regions are not those of answer_text"
        for name in ("tools", "calls", "messages"):
            if not isinstance(_loads(values[name]), list):
                yield f"{where}: {name} is not a JSON list"
        if not isinstance(_loads(values["metadata"]), dict):
            yield f"{where}: metadata is not a JSON object"
        if tokenizer is not None and len(answer):
            yield from _check_text(where, answer, values["answer_text"], tokenizer)


def _may_be_open(
    prompt: np.ndarray, tokenizer: ChatTokenizer | None, dialect: Dialect, opened: bool
) -> tuple[bool, ...]:
    """Whether this prompt has opened the thought: of some templates those behind a tool's output have not (DeepSeek's),
    and without a tokenizer nobody can tell."""
    if tokenizer is not None:
        return (is_thought_open(tokenizer.answer_prefix(tokenizer.decode(prompt[-32:].tolist())), dialect),)
    return (True, False) if opened else (False,)


def _has_regions(values: dict[str, Any], dialect: Dialect, opened: bool) -> bool:
    ends, region_ids = region_spans(values["answer_text"].encode(), starts_in_think=opened, dialect=dialect)
    return bool(values["answer_region_ends"] == ends.tolist() and values["answer_region_ids"] == region_ids.tolist())


def _check_text(where: str, answer: np.ndarray, text: str, tokenizer: ChatTokenizer) -> Iterator[str]:
    if answer[-1] not in (tokenizer.end_of_turn_id, tokenizer.end_of_calls_id):
        yield f"{where}: the answer does not end with {tokenizer.end_of_turn}"
    elif tokenizer.decode(answer[:-1].tolist()) != text:
        yield f"{where}: answer_token_ids do not decode to answer_text"


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@dataclass(slots=True)
class RawFindings:
    """What became of rows that have not been converted yet."""

    num_source: int = 0
    num_examples: int = 0
    num_with_calls: int = 0
    num_refused: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # of each kind of reason, note or problem: where and what

    def lines(self) -> list[str]:
        """For people: kinds of reasons, each with its first row."""
        layouts = ", ".join(f"{name} ({number} rows)" for name, number in self.layouts.items()) or "none"
        return [
            *(
                f"{number} rows cannot be used: {self.first[kind]}"
                for kind, number in self.reasons.most_common(MOST_FINDINGS)
            ),
            *(f"{number} rows suspicious: {self.first[kind]}" for kind, number in self.problems.most_common()),
            *(f"{number} rows: {kind}" for kind, number in self.notes.most_common()),
            f"layout: {layouts}",
            f"{self.num_source} conversations -> {self.num_examples} rows -> {self.num_with_calls} rows with calls",
            f"{self.num_source} rows, {self.num_refused} of them cannot be used",
        ]


def validate_raw(
    paths: Sequence[str],
    *,
    options: EncodeOptions | None = None,
    split: str = "",
    tokenizer: ChatTokenizer | None = None,
) -> RawFindings:
    """What ``convert`` would say of these rows; what needs the tokenizer (control tokens, template) with one only."""
    options = options or EncodeOptions()
    found = RawFindings()
    for chunk in read_chunks(resolve_inputs(paths, split=split)):
        for number, row in chunk.rows():
            found.num_source += 1
            try:
                for example in examples_of_row(row, options.reading):
                    _check_example(example, number, options, tokenizer)
                    found.num_examples += 1
                    found.num_with_calls += bool(example.calls)
                    found.layouts[example.layout] += 1
                    found.notes.update(example.notes)
                    for kind, problem in {kind_of(problem): problem for problem in example.problems}.items():
                        found.problems[kind] += 1
                        found.first.setdefault(kind, f"{chunk.place(number)}: {problem}")
            except RowError as error:
                found.num_refused += 1
                found.reasons[kind_of(str(error))] += 1
                found.first.setdefault(kind_of(str(error)), f"{chunk.place(number)}: {error}")
    if not found.num_source:
        raise DataError("the inputs hold no rows")
    return found


def _check_example(example: Example, number: int, options: EncodeOptions, tokenizer: ChatTokenizer | None) -> None:
    if tokenizer is None:
        check_reference(example)
    else:
        prepare(number, example, tokenizer, options, tokenizer.dialect)
