"""A few hundred raw rows on their way from a reader to the converter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_tools.errors import DataError, RowError

CHUNK_ROWS = 512  # small enough for a fine-grained progress bar, large enough to hide what a process costs
MAX_ROW_BYTES = 64 << 20  # one row; a larger one is an attack or a mistake


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``first_row ...`` of one input file, not yet parsed: cheap to send to another process."""

    source: str
    first_row: int
    payload: pa.RecordBatch | list[bytes] | list[Any]

    @property
    def num_rows(self) -> int:
        """Rows, broken ones included."""
        return len(self.payload) if isinstance(self.payload, list) else int(self.payload.num_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as an Arrow stream: a pickled slice would take the whole record batch along."""
        if isinstance(self.payload, list):
            return Chunk, (self.source, self.first_row, self.payload)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.payload.schema) as writer:
            writer.write_batch(self.payload)
        return _unpickle, (self.source, self.first_row, sink.getvalue())

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(row number in the file, row); a row that cannot be read is a :class:`RowError` in its place."""
        values = self.payload if isinstance(self.payload, list) else arrow_rows(self.payload, self.source)
        for number, value in enumerate(values, start=self.first_row):
            yield number, parse_line(value) if isinstance(value, bytes) else value


def _unpickle(source: str, first_row: int, stream: pa.Buffer) -> Chunk:
    return Chunk(source, first_row, pa.ipc.open_stream(stream).read_next_batch())


def parse_line(line: bytes) -> Any:
    """One line of JSON."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RowError(f"the line is not UTF-8 ({error.reason} at byte {error.start})")
    except ValueError as error:
        return RowError(f"the line is not JSON: {error}")
    except RecursionError:
        return RowError("the line nests too deeply")


def arrow_rows(batch: pa.RecordBatch, source: str) -> list[Any]:
    """Rows of a record batch as dictionaries; nulls inside nested objects are Arrow's padding and are left out."""
    try:
        batch.validate(full=True)
        rows = batch.to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError):
        rows = _decode_bytes(batch, source)
    except (pa.ArrowNotImplementedError, OverflowError, ValueError) as error:
        raise DataError(f"{source}: a column cannot be read: {error}") from error
    return [_row(row) for row in rows]


def _row(row: Any) -> Any:
    return {key: drop_nulls(item) for key, item in row.items()} if isinstance(row, dict) else row


def drop_nulls(value: Any) -> Any:
    """Arrow unites the keys of all objects of a column and fills the gaps with null; undo that."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def _decode_bytes(batch: pa.RecordBatch, source: str) -> list[Any]:
    """A batch that is not valid as text: read strings as bytes and decode row by row, so that good rows survive."""
    try:
        arrays = [_as_binary(column) for column in batch.columns]
        for array in arrays:
            array.validate(full=True)
        raw = pa.RecordBatch.from_arrays(arrays, names=batch.schema.names).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError, ValueError) as error:
        raise DataError(f"{source} is damaged (or truncated): {error}") from error
    rows: list[Any] = []
    for row in raw:
        try:
            rows.append(_decode(row))
        except UnicodeDecodeError as error:
            rows.append(RowError(f"the row is not UTF-8 ({error.reason} at byte {error.start} of a string)"))
    return rows


def _decode(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _as_binary(array: pa.Array) -> pa.Array:
    return array.view(_binary_type(array.type))


def _binary_type(kind: pa.DataType) -> pa.DataType:
    """The same layout with strings read as bytes."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_binary_field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_binary_field(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_binary_field(kind.field(i)) for i in range(kind.num_fields)])
    return kind


def _binary_field(field: pa.Field) -> pa.Field:
    return pa.field(field.name, _binary_type(field.type), field.nullable)
