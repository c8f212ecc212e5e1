"""Arrow IPC (stream and file) and Parquet, one small record batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import DataError
from data_tools.readers.chunk import CHUNK_ROWS, Chunk
from data_tools.readers.sources import Form, Source

# A Parquet row group is decompressed page by page, but its claimed size tells a bomb from data.
MAX_ROW_GROUP_BYTES = 16 << 30
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
    first = 0
    with _named(source):
        for batch in _batches(source):
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                piece = batch.slice(start, CHUNK_ROWS)
                yield Chunk(source.name, first, piece)
                first += piece.num_rows


def count_arrow_rows(source: Source) -> int:
    """Number of rows, from metadata (Parquet, IPC file) or by walking through a stream's batches."""
    with _named(source):
        if source.form is Form.PARQUET:
            return int(pq.read_metadata(source.path).num_rows)
        if source.form is Form.IPC_FILE:
            with pa.memory_map(str(source.path)) as mapped:
                return int(pa.ipc.open_file(mapped).count_rows())
        return sum(batch.num_rows for batch in _batches(source))


def _batches(source: Source) -> Iterator[pa.RecordBatch]:
    if source.form is Form.PARQUET:
        yield from _parquet_batches(source)
    elif source.form is Form.IPC_FILE:
        with pa.memory_map(str(source.path)) as mapped:
            reader = pa.ipc.open_file(mapped)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
    elif source.compression:
        with source.open() as file:
            yield from pa.ipc.open_stream(file)
    else:
        _check_end_of_stream(source)
        with pa.memory_map(str(source.path)) as mapped:
            yield from pa.ipc.open_stream(mapped)


def _check_end_of_stream(source: Source) -> None:
    """pyarrow takes a stream cut between two batches for a whole one; the end marker tells."""
    with open(source.path, "rb") as file:
        file.seek(-min(8, source.path.stat().st_size), 2)
        if file.read() != _END_OF_STREAM:
            raise DataError(f"{source.path} is a truncated {source.form}: its end marker is missing; write it again")


def _parquet_batches(source: Source) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(source.path, memory_map=True) as file:
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            if size > MAX_ROW_GROUP_BYTES:
                raise DataError(
                    f"{source.path}: row group {group} claims {size >> 30} GiB: write it with smaller row groups"
                )
        yield from file.iter_batches(batch_size=CHUNK_ROWS)
