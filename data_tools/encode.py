"""Raw rows to columns: the part of a conversion that runs in worker processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools import answers
from data_tools.chat import ChatTokenizer
from data_tools.errors import DataError, RowError
from data_tools.examples import Example, Reading, examples_of
from data_tools.native import native_answer, native_ground_truth, native_messages, native_tools
from data_tools.readers import Chunk, place_of
from data_tools.values import dumps
from megatron_rest.config import RewardConfig
from megatron_rest.data import prompt_style
from megatron_rest.data.prompt_files import PROMPT_SCHEMA
from megatron_rest.regions import TOOLRL, Dialect, is_thought_open, region_spans
from megatron_rest.rewards import why_not_earnable

DEFAULT_RULES = RewardConfig()
"""The rules by which a reference must earn its own reward; a run with other rules checks again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions:
    """What decides the content of a converted row, beside the tokenizer."""

    prompt_style: str = "original"
    """original, compact or slim (see :mod:`megatron_rest.data.prompt_style`)."""
    max_think_words: int = 0
    """Shorten the thought of answer_text to so many words; 0 = keep.  ground_truth is never touched."""
    reading: Reading = field(default_factory=Reading)
    """How rows are read: layout, mapping, reference, adapter."""
    on_problem: str = "keep"
    """What becomes of rows that the self-check finds suspicious: keep, quarantine or stop."""
    dialect: str = "auto"
    """How prompts ask for calls and answers write them (:mod:`megatron_rest.regions.dialects`), or auto."""


@dataclass(frozen=True, slots=True)
class Refused:
    """One row for the quarantine."""

    source: str
    row: int
    reason: str
    content: Any
    line: int | None = None

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return place_of(self.source, self.row, self.line)


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """What became of one chunk; ``num_in == batch.num_rows + len(refused)``."""

    num_in: int
    batch: pa.RecordBatch
    refused: list[Refused] = field(default_factory=list)
    num_source: int = 0
    """Rows of the input; not ``num_in`` where conversations give several rows or an adapter leaves some out."""
    layouts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """Rows by what was guessed or left out."""
    problems: Counter[str] = field(default_factory=Counter)
    """Rows by what the self-check found suspicious and kept."""
    rewritten: Counter[str] = field(default_factory=Counter)
    """References that were written anew because they did not earn their own reward as they came, by reason."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A row whose texts wait for the tokenizer."""

    row: int
    example: Example
    messages: list[dict[str, Any]]
    ground_truth: str
    prompt: str
    answer: str  # what follows the prompt
    is_opened: bool  # the prompt has opened the thought
    rewritten: str  # why the reference is not as it came; empty: it is


def encode_chunk(chunk: Chunk, tokenizer: ChatTokenizer, options: EncodeOptions) -> EncodedChunk:
    """Normalise, render and tokenise the rows of a chunk, in the tokenizer's dialect.  Every row ends up in the batch
    or among the refused."""
    dialect = tokenizer.dialect
    ready: list[_Ready] = []
    refused: list[Refused] = []
    for number, row in chunk.rows():
        content = None if isinstance(row, RowError) else row
        try:
            examples = examples_of_row(row, options.reading)
        except RowError as error:
            refused.append(Refused(chunk.source, number, str(error), content, chunk.line(number)))
            continue
        for example in examples:
            if example.problems and options.on_problem == "stop":
                raise DataError(f"--on-problem stop: {chunk.place(number)}: {example.problems[0]}")
            try:
                ready.append(prepare(number, example, tokenizer, options, dialect))
            except RowError as error:
                refused.append(Refused(chunk.source, number, str(error), content, chunk.line(number)))
    return EncodedChunk(
        len(ready) + len(refused),
        _columns(chunk.source, ready, tokenizer),
        refused,
        num_source=chunk.num_rows,
        layouts=Counter(item.example.layout for item in ready),
        notes=Counter(note for item in ready for note in item.example.notes),
        problems=Counter(kind for item in ready for kind in {kind_of(p) for p in item.example.problems}),
        rewritten=Counter(item.rewritten for item in ready if item.rewritten),
    )


def examples_of_row(row: Any, reading: Reading) -> list[Example]:
    """The examples of what a reader gave: a row, or why there is none."""
    if isinstance(row, RowError):
        raise row
    return examples_of(row, reading)


def kind_of(reason: str) -> str:
    """The part of a reason that many rows share."""
    return reason.split(":")[0].split("(")[0].split(";")[0].strip()[:120]


def prepare(row: int, example: Example, tokenizer: ChatTokenizer, options: EncodeOptions, dialect: Dialect) -> _Ready:
    """Everything of a row but its tokens; RowError where it cannot be used."""
    if example.problems and options.on_problem == "quarantine":
        raise RowError(example.problems[0], "--on-problem keep takes it all the same")
    write = _prepare_tagged if dialect is TOOLRL else _prepare_native
    return write(row, example, tokenizer, options, dialect)


def _prepare_tagged(
    row: int, example: Example, tokenizer: ChatTokenizer, options: EncodeOptions, dialect: Dialect
) -> _Ready:
    """Everything as text in ToolRL's tags."""
    ground_truth, rewritten = check_reference(example)
    answer = ground_truth
    if options.max_think_words:
        answer = answers.shorten_thought(answer, options.max_think_words)
    messages = prompt_style.apply_style(example.messages, options.prompt_style)
    return _ready(row, example, messages, ground_truth, tokenizer.render(messages), answer, tokenizer, rewritten)


def _prepare_native(
    row: int, example: Example, tokenizer: ChatTokenizer, options: EncodeOptions, dialect: Dialect
) -> _Ready:
    """Tools and calls by the chat template, the answer in the model's own dialect."""
    if example.tools and tokenizer.why_tools_do_not_fit:
        raise RowError(
            f"{tokenizer.why_tools_do_not_fit}: convert with --dialect toolrl, which lists them in the system message, "
            "or with a template for tools (--chat-template PATH)"
        )
    ground_truth, answer = native_ground_truth(example), native_answer(example, dialect)
    why = why_not_earnable(answer, ground_truth, config=DEFAULT_RULES, dialect=dialect)
    if why:
        raise RowError(why)
    messages = native_messages(example)
    prompt = tokenizer.render(messages, native_tools(example.tools))
    return _ready(row, example, messages, ground_truth, prompt, answer, tokenizer, "")


def _ready(
    row: int,
    example: Example,
    messages: list[dict[str, Any]],
    ground_truth: str,
    prompt: str,
    answer: str,
    tokenizer: ChatTokenizer,
    rewritten: str,
) -> _Ready:
    prefix = tokenizer.answer_prefix(prompt)
    answer = tokenizer.normalised(continued(answer, prefix, tokenizer.dialect))
    tokenizer.check_text(answer, tokenizer.dialect)
    opened = is_thought_open(prefix, tokenizer.dialect)
    return _Ready(row, example, messages, ground_truth, prompt, answer, opened, rewritten)


def check_reference(example: Example) -> tuple[str, str]:
    """The reference in tags and why it is not as it came; RowError where it cannot earn its own reward."""
    why = why_not_earnable(example.ground_truth, example.ground_truth, config=DEFAULT_RULES)
    if not why:
        return example.ground_truth, ""
    think = answers.without_tags(example.think) if example.think else None
    anew = answers.compose_answer(example.calls, think=think, response=example.response)
    if why_not_earnable(anew, anew, config=DEFAULT_RULES):
        raise RowError(why)
    return anew, why


def _columns(source: str, ready: list[_Ready], tokenizer: ChatTokenizer) -> pa.RecordBatch:
    ids = tokenizer.encode([*(item.prompt for item in ready), *(item.answer for item in ready)])
    prompts, replies = ids[: len(ready)], ids[len(ready) :]
    # the end of turn starts where the text ends
    starts = [tokenizer.token_starts(reply, item.answer) for reply, item in zip(replies, ready, strict=True)]
    spans = [
        region_spans(item.answer.encode(), starts_in_think=item.is_opened, dialect=tokenizer.dialect) for item in ready
    ]
    ends = [tokenizer.end_of_calls_id if item.example.calls else tokenizer.end_of_turn_id for item in ready]
    columns = {
        "prompt_id": [item.example.prompt_id for item in ready],
        "prompt_token_ids": _lists(prompts),
        "messages": [dumps(item.messages) for item in ready],
        "answer_text": [item.answer for item in ready],
        "answer_token_ids": _lists([np.append(reply, np.int32(end)) for reply, end in zip(replies, ends, strict=True)]),
        "answer_token_starts": _lists(starts),
        "answer_region_ends": _lists([ends for ends, _ in spans]),
        "answer_region_ids": _lists([region_ids for _, region_ids in spans], np.int8),
        "ground_truth": [item.ground_truth for item in ready],
        "tools": [item.example.tools_json for item in ready],
        "calls": [item.example.calls_json for item in ready],
        "metadata": [item.example.metadata_json for item in ready],
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


def continued(answer: str, prefix: str, dialect: Dialect) -> str:
    """What is left to write of an answer behind a prompt that has written ``prefix`` of it."""
    thought = dialect.thought
    if not prefix or thought is None or thought.close is None:
        return answer
    opening, closing = thought.open.decode(), thought.close.decode()
    head, has_thought, rest = answer.partition(closing)
    has_thought = has_thought if head.lstrip().startswith(opening) else ""
    if not is_thought_open(prefix, dialect):  # the prompt has closed an empty thought
        return rest.lstrip() if has_thought else answer
    if not has_thought:
        return f"{closing}\n\n{answer}"
    return head.lstrip().removeprefix(opening).lstrip() + closing + rest
