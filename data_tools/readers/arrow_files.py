"""Arrow IPC (stream and file) and Parquet, one small record batch at a time.

IPC is mapped and given back to the system as it has been read: a batch may be as large as the file, memory must not be.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import DataError
from data_tools.readers.chunk import CHUNK_ROWS, Chunk
from data_tools.readers.sources import Form, Growth, Source

# A Parquet row group is decompressed page by page, but its claimed size tells a bomb from data.
MAX_ROW_GROUP_BYTES = 16 << 30
RELEASE_BYTES = 32 << 20  # mapped bytes that count as this process's memory before they are given back
_PARQUET_ROWS = 32  # rows decompressed at once: a few kilobytes can claim to be gigabytes
_PARQUET_BUFFER = 1 << 20  # bytes of a column chunk read ahead; without it a whole one is read
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@contextmanager
def _named(source: Source) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, KeyError, OverflowError) as error:
        raise DataError(f"{source.path} is a damaged or truncated {source.form}: {error}") from error


def read_arrow(source: Source) -> Iterator[Chunk]:
    """Chunks of at most :data:`CHUNK_ROWS` rows."""
    first, held = 0, 0
    with _named(source):
        mapped = None if source.form is Form.PARQUET or source.compression else _map(source)
        growth = Growth(source.path)
        for batch in _batches(source, mapped, growth):
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                piece = batch.slice(start, CHUNK_ROWS)
                piece.validate()
                yield Chunk(source.name, first, piece)
                first += piece.num_rows
                held += piece.nbytes
                if mapped is not None and held > RELEASE_BYTES:
                    mapped.madvise(mmap.MADV_DONTNEED)  # pages that are still used come back by themselves
                    held = 0


def count_arrow_rows(source: Source) -> int:
    """Number of rows, from metadata (Parquet, IPC file) or by walking through a stream's batches."""
    with _named(source):
        if source.form is Form.PARQUET:
            return int(pq.read_metadata(source.path).num_rows)
        mapped = None if source.compression else _map(source)
        if source.form is Form.IPC_FILE:
            return int(pa.ipc.open_file(_reader(mapped)).count_rows())
        return sum(batch.num_rows for batch in _batches(source, mapped, Growth(source.path)))


def _map(source: Source) -> mmap.mmap:
    with open(source.path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _reader(mapped: mmap.mmap | None) -> pa.BufferReader:
    return pa.BufferReader(pa.py_buffer(mapped))


def _batches(source: Source, mapped: mmap.mmap | None, growth: Growth) -> Iterator[pa.RecordBatch]:
    if source.form is Form.PARQUET:
        yield from _parquet_batches(source, growth)
    else:
        for batch in _ipc_batches(source, mapped):
            growth.add(batch.nbytes)
            yield batch


def _ipc_batches(source: Source, mapped: mmap.mmap | None) -> Iterator[pa.RecordBatch]:
    if source.form is Form.IPC_FILE:
        reader = pa.ipc.open_file(_reader(mapped))
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    elif source.compression:
        with source.open() as file:
            yield from pa.ipc.open_stream(file)
    else:
        _check_end_of_stream(source)
        yield from pa.ipc.open_stream(_reader(mapped))


def _check_end_of_stream(source: Source) -> None:
    """pyarrow takes a stream cut between two batches for a whole one; the end marker tells."""
    with open(source.path, "rb") as file:
        file.seek(-min(8, source.path.stat().st_size), 2)
        if file.read() != _END_OF_STREAM:
            raise DataError(f"{source.path} is a truncated {source.form}: its end marker is missing; write it again")


def _parquet_batches(source: Source, growth: Growth) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(source.path, buffer_size=_PARQUET_BUFFER) as file:
        pending: list[pa.RecordBatch] = []
        num_rows = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            if size > MAX_ROW_GROUP_BYTES:
                raise DataError(
                    f"{source.path}: row group {group} claims {size >> 30} GiB: write it with smaller row groups"
                )
            # one iterator over all groups would keep the buffers of those it has read
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group]):
                growth.add(batch.nbytes)
                pending.append(batch)
                num_rows += batch.num_rows
                if num_rows > CHUNK_ROWS - _PARQUET_ROWS:
                    yield pa.concat_batches(pending)
                    pending, num_rows = [], 0
        if pending:
            yield pa.concat_batches(pending)
