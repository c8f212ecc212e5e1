"""JSON lines and JSON lists, read piece by piece.

``pyarrow.json`` is not used: it fails where a nested field changes its type from row to row, which tool arguments do.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from data_tools.errors import DataError, RowError
from data_tools.readers.chunk import CHUNK_ROWS, MAX_ROW_BYTES, Chunk
from data_tools.readers.sources import Form, Source
from data_tools.values import ROWS, KeyTwice

CHUNK_BYTES = 8 << 20
_BLOCK = 1 << 18
_SPACE = " \t\r\n"


def read_json(source: Source) -> Iterator[Chunk]:
    """Chunks of lines (unparsed) or of list elements."""
    yield from _chunks(_items(source), source)


def count_json_rows(source: Source) -> int:
    """Number of rows, by reading the file once: a small part of what converting it takes."""
    return sum(1 for _ in _items(source))


_Item = tuple[Any, int, int]
"""(row or its line, bytes it takes, number of the line on which it begins)."""


def _items(source: Source) -> Iterator[_Item]:
    readers = {Form.JSON_LINES: _lines, Form.JSON_LIST: _elements, Form.JSON_OBJECTS: _objects}
    try:
        with source.open() as file:
            yield from readers[source.form](file, source)
    except OSError as error:
        raise DataError(f"cannot read {source.path}: {error}") from error


def _chunks(items: Iterator[_Item], source: Source) -> Iterator[Chunk]:
    first, payload, lines, size = 0, [], [], 0
    for item, item_bytes, line in items:
        payload.append(item)
        lines.append(line)
        size += item_bytes
        if len(payload) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield Chunk(source.name, first, payload, tuple(lines))
            first, payload, lines, size = first + len(payload), [], [], 0
    if payload:
        yield Chunk(source.name, first, payload, tuple(lines))


def _lines(file: IO[bytes], source: Source) -> Iterator[_Item]:
    """Lines that are not blank; one that is too long is a broken row."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_BLOCK)
            yield RowError(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB"), 0, number
            continue
        stripped = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if stripped.strip():
            yield stripped, len(stripped), number


class _Text:
    """A growing window of decoded text.  Bytes that are not UTF-8 become lone surrogates; such rows are refused."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text = ""
        self.position = 0
        self.at_end = False
        self._lines, self._counted = 0, 0  # lines of the file before text[_counted]

    def more(self) -> None:
        """Drop what is behind and at least double what is ahead."""
        self.line()
        self.text, self.position, self._counted = self.text[self.position :], 0, 0
        data = self._file.read(max(_BLOCK, len(self.text)))
        self.at_end = not data
        self.text += self._decoder.decode(data, final=self.at_end)

    def line(self) -> int:
        """The line, from 1, on which ``position`` is."""
        self._lines += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._lines + 1

    def peek(self) -> str:
        """The next character that is not space; empty at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in _SPACE:
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if self.at_end:
                return ""
            self.more()


def _elements(file: IO[bytes], source: Source) -> Iterator[_Item]:
    text, count = _Text(file), 0
    if text.peek() == "\ufeff":
        text.position += 1
    text.peek()
    text.position += 1  # the opening bracket
    mark = text.peek()
    while mark != "]":
        line = text.line()
        value, size = _element(text, ROWS, source, count)
        yield value, size, line
        count += 1
        mark = text.peek()
        if mark == ",":
            text.position += 1
            mark = text.peek()
            if mark == "]":
                raise DataError(f"{source.path}: a comma ends the JSON list after row {count - 1}")
        elif mark != "]":
            raise DataError(
                f"{source.path} is damaged or truncated after row {count - 1}: expected ',' or ']', got {mark!r}"
            )
    text.position += 1
    if text.peek():
        raise DataError(f"{source.path}: there is text after the end of the JSON list")


def _objects(file: IO[bytes], source: Source) -> Iterator[_Item]:
    """Objects over several lines, one behind the other."""
    text, count = _Text(file), 0
    if text.peek() == "\ufeff":
        text.position += 1
    while text.peek():
        line = text.line()
        value, size = _element(text, ROWS, source, count)
        yield value, size, line
        count += 1


def _element(text: _Text, decoder: json.JSONDecoder, source: Source, number: int) -> tuple[Any, int]:
    while True:
        try:
            value, end = decoder.raw_decode(text.text, text.position)
        except KeyTwice as error:
            _, size = _element(text, json.JSONDecoder(), source, number)  # tells where the row ends
            return RowError(f"the row is not JSON: {error}"), size
        except (ValueError, RecursionError) as error:
            ahead = len(text.text) - text.position
            if isinstance(error, RecursionError) or text.at_end or ahead > MAX_ROW_BYTES:
                raise DataError(f"{source.path} is damaged or truncated at row {number}: {error}") from error
            text.more()
            continue
        if end == len(text.text) and not text.at_end:  # a number may go on in the next block
            text.more()
            continue
        size = end - text.position
        text.position = end
        return value, size
