"""A few hundred raw rows on their way from a reader to the converter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_tools.errors import DataError, RowError
from data_tools.values import ROWS

CHUNK_ROWS = 512  # small enough for a fine-grained progress bar, large enough to hide what a process costs
_JSON_TYPE = "arrow.json"
MAX_ROW_BYTES = 64 << 20  # one row; a larger one is an attack or a mistake


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``first_row ...`` of one input file, not yet parsed: cheap to send to another process."""

    source: str
    first_row: int
    payload: pa.RecordBatch | list[bytes] | list[Any]
    lines: tuple[int, ...] = ()  # of text files: the line (from 1) on which each row begins

    @property
    def num_rows(self) -> int:
        """Rows, broken ones included."""
        return len(self.payload) if isinstance(self.payload, list) else int(self.payload.num_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as an Arrow stream: a pickled slice would take the whole record batch along."""
        if isinstance(self.payload, list):
            return Chunk, (self.source, self.first_row, self.payload, self.lines)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.payload.schema) as writer:
            writer.write_batch(self.payload)
        return _unpickle, (self.source, self.first_row, sink.getvalue())

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(row number in the file, row); a row that cannot be read is a :class:`RowError` in its place."""
        values = self.payload if isinstance(self.payload, list) else arrow_rows(self.payload, self.source)
        for number, value in enumerate(values, start=self.first_row):
            yield number, parse_line(value) if isinstance(value, bytes) else value

    def line(self, row: int) -> int | None:
        """The line (from 1) on which a row of a text file begins."""
        return self.lines[row - self.first_row] if self.lines else None

    def place(self, row: int) -> str:
        """Where a row is, for people: ``rows.jsonl line 4 (row 1)``."""
        return place_of(self.source, row, self.line(row))


def place_of(source: str, row: int, line: int | None) -> str:
    """Where a row is: rows are counted from 0, as in the prepared folder's ``source_row``, lines from 1."""
    return f"{source} row {row}" if line is None else f"{source} line {line} (row {row})"


def _unpickle(source: str, first_row: int, stream: pa.Buffer) -> Chunk:
    return Chunk(source, first_row, pa.ipc.open_stream(stream).read_next_batch())


def parse_line(line: bytes) -> Any:
    """One line of JSON."""
    try:
        return ROWS.decode(line.decode())
    except UnicodeDecodeError as error:
        return RowError(f"the line is not UTF-8 ({error.reason} at byte {error.start})")
    except ValueError as error:
        return RowError(f"the line is not JSON: {error}")
    except RecursionError:
        return RowError("the line nests too deeply")


def arrow_rows(batch: pa.RecordBatch, source: str) -> list[Any]:
    """Rows of a record batch as dictionaries, by what the schema says: JSON text and maps are objects, nulls in structs
    are gaps that Arrow filled (those in JSON text and in maps were meant)."""
    try:
        batch.validate(full=True)
        rows = batch.to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError):
        rows = _decode_bytes(batch, source)
    except (pa.ArrowNotImplementedError, OverflowError, ValueError) as error:
        raise DataError(f"{source}: a column cannot be read: {error}") from error
    decoders = [(field.name, decoder) for field in batch.schema if (decoder := _decoder(field)) is not None]
    return [_decoded(row, decoders) for row in rows] if decoders else rows


Decoder = Callable[[Any], Any]


def _decoded(row: Any, decoders: list[tuple[str, Decoder]]) -> Any:
    if not isinstance(row, dict):
        return row
    try:
        for name, decode in decoders:
            row[name] = decode(row[name])
    except (ValueError, RecursionError) as error:
        return RowError(f"a column that is JSON by its type is not: {error}")
    return row


def _decoder(field: pa.Field) -> Decoder | None:
    """What makes plain values of a field's; None where they are plain."""
    kind = field.type
    name = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode("utf-8", "replace")
    if getattr(kind, "extension_name", name) == _JSON_TYPE:  # an older pyarrow leaves the name in the metadata
        return _from_json
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _decoder(pa.field("", kind.value_type))
    if _is_binary(kind):
        return _as_text
    if pa.types.is_map(kind):
        return _of_map(_decoder(kind.item_field))
    if pa.types.is_struct(kind):
        inner = [kind.field(i) for i in range(kind.num_fields)]
        return _of_struct({part.name: decoder for part in inner if (decoder := _decoder(part)) is not None})
    if _is_list(kind):
        item = _decoder(kind.value_field)
        return (lambda value: value and [item(part) for part in value]) if item else None
    return None


def _is_binary(kind: pa.DataType) -> bool:
    names = ("is_binary", "is_large_binary", "is_binary_view")
    return any(getattr(pa.types, name)(kind) for name in names if hasattr(pa.types, name))


def _as_text(value: Any) -> Any:
    """Bytes that are text: writers of Parquet without a type for text leave them so (fastparquet)."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _is_list(kind: pa.DataType) -> bool:
    names = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, name)(kind) for name in names if hasattr(pa.types, name))


def _from_json(value: Any) -> Any:
    return (
        ROWS.decode(value if isinstance(value, str) else value.decode()) if isinstance(value, (str, bytes)) else value
    )


def _of_map(item: Decoder | None) -> Decoder:
    def decode(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        made = {key: item(held) if item else held for key, held in value}
        if len(made) < len(value):
            raise ValueError("a map has a key twice")
        return made

    return decode


def _of_struct(decoders: dict[str, Decoder]) -> Decoder:
    """Arrow unites the keys of all objects of a column and fills the gaps with null: undone here."""

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: decoders[key](item) if key in decoders else item for key, item in value.items() if item is not None
        }

    return decode


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
