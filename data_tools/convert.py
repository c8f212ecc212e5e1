"""Convert rows of any form and layout into a folder that training memory-maps.

Chunks are read in order, encoded by worker processes and written in order: the number of processes changes no byte of
the output.  At most ``2 processes`` chunks are under way, so memory does not grow with the input.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

import megatron_rest
from data_tools.adapter import describe_adapter, load_adapter
from data_tools.chat import ChatTokenizer
from data_tools.checks import POLICIES
from data_tools.encode import DEFAULT_RULES, EncodedChunk, EncodeOptions, encode_chunk, examples_of_row
from data_tools.errors import DataError, RowError
from data_tools.examples import Reading
from data_tools.layouts import OWN, find_layout
from data_tools.native import asks_for_tags
from data_tools.readers import Chunk, Source, count_rows, read_chunks, resolve_inputs
from data_tools.writer import OutputFolder, sha256_file
from megatron_rest.data.chat_template import TEMPLATE_DATE
from megatron_rest.data.prompt_files import MANIFEST_NAME, QUARANTINE_NAME, SCHEMA_VERSION
from megatron_rest.data.prompt_style import STYLES
from megatron_rest.regions import TOOLRL, find_dialect

AUTO = "auto"
FEWEST_CHUNKS_FOR_A_POOL = 8  # below that, starting processes costs more than it saves
MOST_ROWS_FOR_DIALECT = 4096  # that are looked at for a usable one
MOST_LOST = 0.05
MOST_REASONS = 8  # that are shown where no row is usable
MOST_PROCESSES = 16  # unless asked for: one process reads and writes for all, and is busy with about ten of them
GC_THRESHOLD = 100_000  # rows of a chunk are thousands of objects without cycles: looking for some costs a tenth
_STYLE_NOTES = {
    "original": "messages as they came",
    "compact": "constant instruction blocks dropped, headings shortened, for toy models; tools and dialogue untouched",
    "slim": "as compact, and each tool in one line: name, parameter names and types, description; defaults are lost",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """Everything ``convert`` can be told."""

    inputs: list[str]
    output: Path
    tokenizer: Path
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    split: str = ""
    licence: str = ""
    strict: bool = False
    max_lost: float = MOST_LOST
    """Share of rows that may be lost before the command's status says so."""
    overwrite: bool = False
    processes: int = 0
    rows_per_shard: int = 1 << 16
    progress_bar: bool = True
    chat_template: str = "stock"
    """As ``model.chat_template``: stock, append_only, a shipped one's name or a path."""

    def __post_init__(self) -> None:
        if self.encode.dialect != AUTO:
            try:
                find_dialect(self.encode.dialect)
            except ValueError as error:
                raise DataError(f"--dialect: {error}") from error
        if self.encode.prompt_style not in STYLES:
            raise DataError(f"--prompt-style is {self.encode.prompt_style!r}, expected one of {', '.join(STYLES)}")
        if self.encode.max_think_words < 0:
            raise DataError(
                f"--max-think-words is {self.encode.max_think_words}, expected a positive number (0 = keep)"
            )
        if self.encode.on_problem not in POLICIES:
            raise DataError(f"--on-problem is {self.encode.on_problem!r}, expected one of {', '.join(POLICIES)}")
        if not 0 <= self.max_lost <= 1:
            raise DataError(f"--max-lost is {self.max_lost}, expected a share from 0 to 1")
        if self.encode.reading.layout:
            find_layout(self.encode.reading.layout)
        if self.encode.reading.adapter:
            load_adapter(self.encode.reading.adapter)
        if self.rows_per_shard < 1:
            raise DataError(f"--rows-per-shard is {self.rows_per_shard}, expected at least 1")

    def open_tokenizer(self) -> ChatTokenizer:
        """For the dialect, which must be decided."""
        dialect = find_dialect(self.encode.dialect)
        return ChatTokenizer(self.tokenizer, dialect=dialect, template=self.chat_template)


def convert_rows(options: ConvertOptions, examples: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a conversion (or go on with an interrupted one) and return its manifest.

    ``examples`` gets, of each reason for the quarantine, the first row and the whole reason.
    """
    if options.output.exists() and not options.overwrite:
        raise DataError(f"{options.output} exists: give --overwrite to replace it, or another --output")
    sources = resolve_inputs(options.inputs, split=options.split)
    options = with_dialect(options, sources)
    tokenizer = options.open_tokenizer()
    identity = _identity(options, sources, tokenizer)
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    metadata = {
        "megatron_rest.schema_version": str(SCHEMA_VERSION),
        "megatron_rest.tokenizer": tokenizer.identity,
        "megatron_rest.chat_template": tokenizer.template_identity,
    }
    with OutputFolder(
        options.output, fingerprint=fingerprint, metadata=metadata, rows_per_shard=options.rows_per_shard
    ) as folder:
        _fill(folder, sources, options)
        folder.close_shard()
        if folder.progress.num_out == 0:
            raise DataError(_nothing_usable(folder))
        if examples is not None:
            examples.update(folder.progress.examples)
        return folder.finish(identity, overwrite=options.overwrite)


def with_dialect(options: ConvertOptions, sources: list[Source]) -> ConvertOptions:
    """Decide ``auto``: ToolRL's tags where the first usable row's own system message asks for them, or where the chat
    template shows no calls; else the template's dialect."""
    if options.encode.dialect != AUTO:
        return options
    dialect = ChatTokenizer(options.tokenizer, template=options.chat_template).template_dialect or TOOLRL
    if dialect is not TOOLRL:
        rows = (row for chunk in read_chunks(sources) for _, row in chunk.rows())
        for row in islice(rows, MOST_ROWS_FOR_DIALECT):
            try:
                examples = examples_of_row(row, options.encode.reading)
            except RowError:
                continue
            if examples:
                dialect = TOOLRL if asks_for_tags(examples[0]) else dialect
                break
    return replace(options, encode=replace(options.encode, dialect=dialect.name))


def _fill(folder: OutputFolder, sources: list[Source], options: ConvertOptions) -> None:
    chunks = read_chunks(sources)
    if sum(chunk.num_rows for chunk in islice(chunks, folder.progress.num_chunks)) != folder.progress.num_source:
        raise DataError(f"{folder.partial} was begun by another version that cut the rows differently: delete it")
    with tqdm(
        total=sum(count_rows(source) for source in sources),
        initial=folder.progress.num_source,
        desc="convert",
        unit="row",
        disable=None if options.progress_bar else True,
    ) as bar:
        for encoded in encoded_chunks(chunks, options):
            if options.strict and encoded.refused:
                first = encoded.refused[0]
                raise DataError(f"--strict: {first.place}: {first.reason}")
            folder.add(encoded)
            bar.update(encoded.num_source)


def encoded_chunks(chunks: Iterable[Chunk], options: ConvertOptions) -> Iterator[EncodedChunk]:
    """Encode in order; in this process while there are few chunks, in a pool beyond that."""
    before = gc.get_threshold()
    gc.set_threshold(GC_THRESHOLD)
    try:
        yield from _encoded_chunks(chunks, options)
    finally:
        gc.set_threshold(*before)


def _encoded_chunks(chunks: Iterable[Chunk], options: ConvertOptions) -> Iterator[EncodedChunk]:
    processes = options.processes or min(available_cores(), MOST_PROCESSES)
    remaining = iter(chunks)
    head = list(islice(remaining, FEWEST_CHUNKS_FOR_A_POOL)) if processes > 1 else []
    if len(head) < FEWEST_CHUNKS_FOR_A_POOL:
        tokenizer = options.open_tokenizer()
        for chunk in (*head, *remaining) if processes > 1 else remaining:
            yield encode_chunk(chunk, tokenizer, options.encode)
        return
    # The parent is one of the processes: it encodes while workers start (importing takes them a second), and later
    # whenever all of them have a next chunk waiting.  With many workers it is kept busy by reading and writing instead.
    context = multiprocessing.get_context("spawn")  # threads of pyarrow and tokenizers do not survive a fork
    arguments = (options,)
    most_in_pool = 2 * (processes - 1)
    waiting: deque[Future[EncodedChunk]] = deque()
    with ProcessPoolExecutor(processes - 1, mp_context=context, initializer=_start_worker, initargs=arguments) as pool:
        try:
            is_started = pool.submit(_say_ready)
            tokenizer = options.open_tokenizer()
            for chunk in chain(head, remaining):
                if is_started.done() and sum(not future.done() for future in waiting) < most_in_pool:
                    waiting.append(pool.submit(_work, chunk))
                else:
                    waiting.append(_done(encode_chunk(chunk, tokenizer, options.encode)))
                while waiting and (waiting[0].done() or len(waiting) > most_in_pool + 1):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            _stop_feeding(pool)
            raise DataError(
                "a worker process died (out of memory?): give the command again, with fewer --processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _stop_feeding(pool: ProcessPoolExecutor) -> None:
    """Before Python 3.11.5 a pool whose only worker died while a chunk was on its way to it waits for ever: the chunk
    is larger than a pipe, and the pool keeps the pipe's other end open (python/cpython#94777)."""
    if sys.version_info < (3, 11, 5):
        pool._call_queue._reader.close()  # type: ignore[attr-defined]


def _done(encoded: EncodedChunk) -> Future[EncodedChunk]:
    future: Future[EncodedChunk] = Future()
    future.set_result(encoded)
    return future


def available_cores() -> int:
    """Cores this process may use (a Slurm or container limit counts, where the system tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_encode: Callable[[Chunk], EncodedChunk] | None = None


def _start_worker(options: ConvertOptions) -> None:
    global _encode
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    pa.set_cpu_count(1)
    tokenizer = options.open_tokenizer()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    _encode = lambda chunk: encode_chunk(chunk, tokenizer, options.encode)  # noqa: E731


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _say_ready() -> None:
    """Runs in the first worker that has started."""


def _work(chunk: Chunk) -> EncodedChunk:
    assert _encode is not None, "the pool starts every worker with _start_worker"
    return _encode(chunk)


def _identity(options: ConvertOptions, sources: list[Source], tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What the output depends on: the same identity gives the same bytes."""
    import tokenizers

    encode = options.encode
    return {
        "format": "megatron_rest prompts",
        "schema_version": SCHEMA_VERSION,
        "tokenizer": {
            "identity": tokenizer.identity,
            "chat_template_identity": tokenizer.template_identity,
            "end_of_turn": tokenizer.end_of_turn,
            "chat_template": options.chat_template,
            "chat_template_sha256": hashlib.sha256(tokenizer.template_text.encode()).hexdigest(),
            "generation_prompt": tokenizer.generation_prompt,
            "template_date": TEMPLATE_DATE.date().isoformat(),
            "dialect": encode.dialect,
        },
        "references": {"earn_full_marks_under": asdict(DEFAULT_RULES)},
        "options": {
            "prompt_style": encode.prompt_style,
            "max_think_words": encode.max_think_words,
            "reading": _describe_reading(encode.reading),
            "on_problem": encode.on_problem,
            "split": options.split,
            "rows_per_shard": options.rows_per_shard,
        },
        "notes": _notes(encode),
        "licence": options.licence
        or "not stated: see the inputs' own licences, and keep their attribution with copies",
        "inputs": [
            {
                "name": source.name,
                "form": str(source.form) + (f" in {source.compression}" if source.compression else ""),
                "bytes": source.path.stat().st_size,
                "sha256": sha256_file(source.path),
            }
            for source in sources
        ],
        "written_by": {
            "megatron_rest": megatron_rest.__version__,
            "pyarrow": pa.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def _describe_reading(reading: Reading) -> dict[str, Any]:
    described = {**asdict(reading), "adapter": describe_adapter(reading.adapter) if reading.adapter else None}
    return {key: value for key, value in described.items() if value}


def _notes(encode: EncodeOptions) -> list[str]:
    notes = [f"prompt style {encode.prompt_style}: {_STYLE_NOTES[encode.prompt_style]}"]
    if encode.max_think_words:
        notes.append(
            f"thoughts of answer_text shortened to {encode.max_think_words} words, for warm starts of toy models; "
            "ground_truth is the original"
        )
    return notes


def _nothing_usable(folder: OutputFolder) -> str:
    progress = folder.progress
    if not progress.num_source:
        return "the inputs hold no rows"
    if not progress.num_in:
        return f"the adapter leaves out all of {progress.num_source} rows"
    [first, *others] = [f"{progress.reasons[reason]} rows: {first}" for reason, first in progress.examples.items()]
    more = "".join(f"\n  {line}" for line in others[:MOST_REASONS])
    return (
        f"none of {progress.num_in} rows is usable; {first}{more}\n"
        f"  all rows with their reasons: {folder.partial / QUARANTINE_NAME}"
    )


def lost_share(manifest: dict[str, Any]) -> float:
    """Share of the rows that went to the quarantine."""
    counts = manifest["counts"]
    return float(counts["rows_quarantined"] / max(counts["rows_in"], 1))


def describe(manifest: dict[str, Any], output: Path, examples: Mapping[str, str] | None = None) -> str:
    """The summary a person sees at the end."""
    counts = manifest["counts"]
    lines = [
        f"{output}: {counts['rows_in']} rows in, {counts['rows_out']} out, {counts['rows_quarantined']} quarantined"
        f" ({sum(shard['bytes'] for shard in manifest['outputs']) / 1e6:.1f} MB, {MANIFEST_NAME})"
    ]
    if counts.get("layouts"):
        how = {OWN: "as the mapping says"}
        found = [f"{name} ({number} rows, {how.get(name, 'recognised')})" for name, number in counts["layouts"].items()]
        lines.append(f"  layout: {', '.join(found)}")
        lines.append(
            f"  {counts['source_rows']} conversations -> {counts['rows_out']} rows -> "
            f"{counts['rows_with_calls']} rows with calls"
        )
    made = manifest["tokenizer"]
    lines.append(f"  dialect {made.get('dialect', TOOLRL.name)}, answers end with {made.get('end_of_turn')}")
    rewritten = counts.get("rewritten_reasons", {})
    lines += [f"  {number} references rewritten so that they do: {reason}" for reason, number in rewritten.items()]
    lines += [f"  {number} rows: {note}" for note, number in counts.get("notes", {}).items()]
    lines += [f"  {number} rows suspicious, kept: {problem}" for problem, number in counts.get("problems", {}).items()]
    for reason, number in counts["quarantine_reasons"].items():
        lines.append(f"  quarantined {number}: {(examples or {}).get(reason, reason)}")
    return "\n".join(lines)
