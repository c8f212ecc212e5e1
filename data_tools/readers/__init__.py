"""Readers: whatever form the rows come in, they leave as :class:`~data_tools.readers.chunk.Chunk` objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from data_tools.readers.arrow_files import count_arrow_rows, read_arrow
from data_tools.readers.chunk import Chunk, place_of
from data_tools.readers.json_text import count_json_rows, read_json
from data_tools.readers.sources import Form, Source, resolve_inputs

__all__ = ["Chunk", "Form", "Source", "count_rows", "place_of", "read_chunks", "resolve_inputs"]

_JSON_FORMS = (Form.JSON_LINES, Form.JSON_LIST, Form.JSON_OBJECTS)


def read_chunks(sources: Iterable[Source]) -> Iterator[Chunk]:
    """All rows of all sources, in order."""
    for source in sources:
        yield from read_json(source) if source.form in _JSON_FORMS else read_arrow(source)


def count_rows(source: Source) -> int:
    """Rows of a source, for the progress bar."""
    return count_json_rows(source) if source.form in _JSON_FORMS else count_arrow_rows(source)
