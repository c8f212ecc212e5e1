"""The output folder: built beside its final place, renamed when it is whole.

    OUTPUT.partial/      data-*.arrow (finished shards), quarantine.jsonl, progress.json
    OUTPUT/              appears in one rename, after everything has reached the disk

``progress.json`` is written after each finished shard: an interrupted conversion goes on from there, and the bytes are
the same as those of one that was never interrupted.  Anything newer than ``progress.json`` says is thrown away.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa

from data_tools.encode import EncodedChunk, Refused, kind_of
from data_tools.errors import DataError
from data_tools.values import marked
from megatron_rest.data.prompt_files import MANIFEST_NAME, PROMPT_SCHEMA, QUARANTINE_NAME

BATCH_ROWS = 1024  # rows of one record batch in the output, whatever the input's were
_PROGRESS = "progress.json"


@dataclass(kw_only=True)
class Progress:
    """How far a conversion has come; everything that a resumed one needs."""

    fingerprint: str
    num_chunks: int = 0
    num_source: int = 0  # rows of the input
    num_in: int = 0  # rows that they gave
    num_out: int = 0
    num_quarantined: int = 0
    quarantine_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    rewritten: dict[str, int] = field(default_factory=dict)  # references written anew, by reason
    layouts: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)
    with_calls: int = 0
    examples: dict[str, str] = field(default_factory=dict)  # of each reason the first row and the whole reason


class _Shard:
    """One data file under construction: batches of exactly :data:`BATCH_ROWS` rows, written as they fill."""

    def __init__(self, folder: Path, name: str, metadata: dict[str, str]) -> None:
        self.name = name
        self.num_rows = 0
        self._path = folder / name
        self._temporary = folder / (name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by finish or abandon
        self._writer = pa.ipc.new_file(self._file, PROMPT_SCHEMA.with_metadata(metadata))
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self.num_rows += batch.num_rows
        self._pending.append(batch)
        self._pending_rows += batch.num_rows
        if self._pending_rows >= BATCH_ROWS:
            self._write(all_of_it=False)

    def finish(self) -> dict[str, Any]:
        """Write the rest, reach the disk, take the final name; returns the manifest's entry."""
        self._write(all_of_it=True)
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        size = self._temporary.stat().st_size
        entry = {"name": self.name, "rows": self.num_rows, "bytes": size, "sha256": sha256_file(self._temporary)}
        self._temporary.rename(self._path)
        return entry

    def abandon(self) -> None:
        self._file.close()

    def _write(self, *, all_of_it: bool) -> None:
        if not self._pending:
            return
        batch = pa.concat_batches(self._pending)
        whole = batch.num_rows if all_of_it else batch.num_rows - batch.num_rows % BATCH_ROWS
        for start in range(0, whole, BATCH_ROWS):
            self._writer.write_batch(batch.slice(start, min(BATCH_ROWS, whole - start)))
        rest = batch.slice(whole)
        self._pending, self._pending_rows = ([rest] if rest.num_rows else []), rest.num_rows


class OutputFolder:
    """Writes shards of record batches and the quarantine; a context manager that leaves no half-written output."""

    def __init__(
        self,
        output: Path,
        *,
        fingerprint: str,
        metadata: dict[str, str],
        rows_per_shard: int,
        resume: bool = True,
    ) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self._metadata = metadata
        self._rows_per_shard = rows_per_shard
        self._shard: _Shard | None = None
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.partial)
        self.progress = self._load_progress(fingerprint, resume)
        self._quarantine = open(self.partial / QUARANTINE_NAME, "ab")  # noqa: SIM115 - closed by __exit__
        self._quarantine.truncate(self.progress.quarantine_bytes)
        self._quarantine.seek(0, os.SEEK_END)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.abandon()
        self._quarantine.close()
        self._lock.close()

    def add(self, chunk: EncodedChunk) -> None:
        """Take the next chunk, in order."""
        progress = self.progress
        for refused in chunk.refused:
            self._quarantine.write(_quarantine_line(refused))
            reason = kind_of(refused.reason)
            progress.reasons[reason] = progress.reasons.get(reason, 0) + 1
            progress.examples.setdefault(reason, f"{refused.place}: {refused.reason}"[:500])
        for reason, number in chunk.rewritten.items():
            progress.rewritten[kind_of(reason)] = progress.rewritten.get(kind_of(reason), 0) + number
        for name in ("layouts", "notes", "problems"):
            totals = getattr(progress, name)
            for what, number in getattr(chunk, name).items():
                totals[what] = totals.get(what, 0) + number
        progress.num_chunks += 1
        progress.num_source += chunk.num_source
        progress.with_calls += sum(calls != "[]" for calls in chunk.batch.column("calls").to_pylist())
        progress.num_in += chunk.num_in
        progress.num_out += chunk.batch.num_rows
        progress.num_quarantined += len(chunk.refused)
        if chunk.batch.num_rows:
            if self._shard is None:
                self._shard = _Shard(self.partial, f"data-{len(progress.shards):05d}.arrow", self._metadata)
            self._shard.add(chunk.batch)
            if self._shard.num_rows >= self._rows_per_shard:
                self.close_shard()

    def close_shard(self) -> None:
        """Finish the current file and remember that it is there."""
        if self._shard is not None:
            self.progress.shards.append(self._shard.finish())
            self._shard = None
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        self.progress.quarantine_bytes = self._quarantine.tell()
        write_atomically(self.partial / _PROGRESS, json.dumps(asdict(self.progress)).encode())

    def finish(self, identity: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
        """Write the manifest (``identity``, counts, hashes), put the folder in its place; returns the manifest."""
        self.close_shard()
        manifest = {**identity, **self._counts()}
        write_atomically(
            self.partial / MANIFEST_NAME, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
        )
        (self.partial / _PROGRESS).unlink()
        (self.partial / ".lock").unlink()
        _sync_folder(self.partial)
        replaced = self.output.with_name(self.output.name + ".replaced")
        if self.output.exists():
            if not overwrite:
                raise DataError(f"{self.output} exists: give --overwrite to replace it")
            shutil.rmtree(replaced, ignore_errors=True)
            self.output.rename(replaced)
        self.partial.rename(self.output)
        _sync_folder(self.output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return manifest

    def _counts(self) -> dict[str, Any]:
        """The part of the manifest that tells what was written."""
        progress = self.progress
        if progress.num_in != progress.num_out + progress.num_quarantined:
            raise AssertionError(f"rows do not add up: {progress}")
        return {
            "counts": {
                "rows_in": progress.num_in,
                "rows_out": progress.num_out,
                "rows_quarantined": progress.num_quarantined,
                "quarantine_reasons": dict(sorted(progress.reasons.items())),
                "references_rewritten": sum(progress.rewritten.values()),
                "rewritten_reasons": dict(sorted(progress.rewritten.items())),
                "source_rows": progress.num_source,
                "rows_with_calls": progress.with_calls,
                "layouts": dict(sorted(progress.layouts.items())),
                "notes": dict(sorted(progress.notes.items())),
                "problems": dict(sorted(progress.problems.items())),
            },
            "outputs": progress.shards,
            "quarantine": {
                "name": QUARANTINE_NAME,
                "bytes": progress.quarantine_bytes,
                "sha256": sha256_file(self.partial / QUARANTINE_NAME),
            },
        }

    def _load_progress(self, fingerprint: str, resume: bool) -> Progress:
        """The progress of an earlier run with the same inputs and options; otherwise start afresh."""
        progress = Progress(fingerprint=fingerprint)
        try:
            stored = Progress(**json.loads((self.partial / _PROGRESS).read_text()))
            if resume and stored.fingerprint == fingerprint and all(self._is_whole(entry) for entry in stored.shards):
                progress = stored
        except (OSError, ValueError, TypeError):
            pass  # nothing to go on from
        keep = {entry["name"] for entry in progress.shards} | {".lock", QUARANTINE_NAME, _PROGRESS}
        for file in self.partial.iterdir():
            if file.name not in keep:
                file.unlink()
        return progress

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        path = self.partial / entry["name"]
        return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]


def _lock(folder: Path) -> IO[bytes]:
    file = open(folder / ".lock", "wb")  # noqa: SIM115 - held until the folder is closed
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise DataError(f"another conversion is writing {folder}: wait for it or choose another --output") from error
    return file


def _quarantine_line(refused: Refused) -> bytes:
    record = {"file": refused.source, "row": refused.row, "line": refused.line, "reason": refused.reason}
    try:
        text = json.dumps({**record, "content": refused.content}, default=_as_text, allow_nan=False)
    except (ValueError, TypeError, RecursionError):  # NaN and Infinity, keys that are no text, no end of nesting
        text = json.dumps({**record, "content": marked(refused.content)}, default=_as_text, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def write_atomically(path: Path, data: bytes) -> None:
    """Write, reach the disk, rename: readers see the old content or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
