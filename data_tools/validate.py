"""Check a prepared folder in full, or raw rows without writing anything.  Findings are sentences; none means good."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.chat import ChatTokenizer
from data_tools.encode import check_reference
from data_tools.errors import DataError, RowError
from data_tools.folders import PreparedFolder, lists
from data_tools.layouts import Columns, normalise
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


def validate_raw(
    paths: Sequence[str], *, columns: Columns | None = None, split: str = ""
) -> tuple[int, Counter[str], list[str]]:
    """(rows, reasons, first findings) of rows that have not been converted yet."""
    num_rows, reasons = 0, Counter[str]()
    findings: list[str] = []
    for chunk in read_chunks(resolve_inputs(paths, split=split)):
        for number, row in chunk.rows():
            num_rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                check_reference(normalise(row, columns))
            except RowError as error:
                reasons[str(error).split(":")[0][:80]] += 1
                if len(findings) < MOST_FINDINGS:
                    findings.append(f"{chunk.source} row {number}: {error}")
    if not num_rows:
        raise DataError("the inputs hold no rows")
    return num_rows, reasons, findings
