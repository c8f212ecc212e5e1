"""Raw rows to columns: the part of a conversion that runs in worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools import answers
from data_tools.chat import ChatTokenizer
from data_tools.errors import RowError
from data_tools.layouts import Columns, Example, normalise
from data_tools.readers import Chunk
from megatron_rest.data import prompt_style
from megatron_rest.data.prompt_files import PROMPT_SCHEMA
from megatron_rest.regions import region_spans


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions:
    """What decides the content of a converted row, beside the tokenizer."""

    prompt_style: str = "original"
    """original, compact or slim (see :mod:`megatron_rest.data.prompt_style`)."""
    max_think_words: int = 0
    """Shorten the thought of answer_text to so many words; 0 = keep.  ground_truth is never touched."""
    columns: Columns | None = None
    """Column mapping; None = recognise the layout."""


@dataclass(frozen=True, slots=True)
class Refused:
    """One row for the quarantine."""

    source: str
    row: int
    reason: str
    content: Any


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """What became of one chunk; ``num_in == batch.num_rows + len(refused)``."""

    num_in: int
    batch: pa.RecordBatch
    refused: list[Refused] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A row whose texts wait for the tokenizer."""

    row: int
    example: Example
    messages: list[dict[str, str]]
    prompt: str
    answer: str


def encode_chunk(chunk: Chunk, tokenizer: ChatTokenizer, options: EncodeOptions) -> EncodedChunk:
    """Normalise, render and tokenise the rows of a chunk.  Every row ends up in the batch or among the refused."""
    ready, refused = [], []
    for number, row in chunk.rows():
        try:
            if isinstance(row, RowError):
                raise row
            ready.append(_prepare(number, normalise(row, options.columns), tokenizer, options))
        except RowError as error:
            refused.append(Refused(chunk.source, number, str(error), None if isinstance(row, RowError) else row))
    return EncodedChunk(chunk.num_rows, _columns(chunk.source, ready, tokenizer), refused)


def _prepare(row: int, example: Example, tokenizer: ChatTokenizer, options: EncodeOptions) -> _Ready:
    answer = example.ground_truth
    if options.max_think_words:
        answer = answers.shorten_thought(answer, options.max_think_words)
    tokenizer.check_text(answer)
    messages = prompt_style.apply_style(example.messages, options.prompt_style)
    return _Ready(row, example, messages, tokenizer.render(messages), answer)


def _columns(source: str, ready: list[_Ready], tokenizer: ChatTokenizer) -> pa.RecordBatch:
    ids = tokenizer.encode([*(item.prompt for item in ready), *(item.answer for item in ready)])
    prompts, replies = ids[: len(ready)], ids[len(ready) :]
    # the end of turn starts where the text ends
    starts = [tokenizer.token_starts(reply, item.answer) for reply, item in zip(replies, ready, strict=True)]
    spans = [region_spans(item.answer.encode()) for item in ready]
    end_of_turn = np.array([tokenizer.end_of_turn_id], dtype=np.int32)
    columns = {
        "prompt_id": [item.example.prompt_id for item in ready],
        "prompt_token_ids": _lists(prompts),
        "messages": [answers.dumps(item.messages) for item in ready],
        "answer_text": [item.answer for item in ready],
        "answer_token_ids": _lists([np.concatenate([reply, end_of_turn]) for reply in replies]),
        "answer_token_starts": _lists(starts),
        "answer_region_ends": _lists([ends for ends, _ in spans]),
        "answer_region_ids": _lists([region_ids for _, region_ids in spans], np.int8),
        "ground_truth": [item.example.ground_truth for item in ready],
        "tools": [item.example.tools_json for item in ready],
        "calls": [item.example.calls_json for item in ready],
        "source_file": [source] * len(ready),
        "source_row": [item.row for item in ready],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in PROMPT_SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=PROMPT_SCHEMA)


def _lists(rows: Sequence[np.ndarray | None], dtype: type[np.signedinteger] = np.int32) -> pa.Array:
    """list<int32> (or of another type) without a Python object per number; None is null."""
    lengths = [0 if row is None else len(row) for row in rows]
    offsets = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(lengths, dtype=np.int32)])
    values = np.concatenate([np.zeros(0, dtype=dtype), *(row for row in rows if row is not None)])
    mask = pa.array([row is None for row in rows], pa.bool_()) if any(row is None for row in rows) else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=mask)
