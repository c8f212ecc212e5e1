"""One row as a person wants to see it: messages, tools, and the reference answer coloured by regions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

from data_tools.encode import examples_of_row
from data_tools.errors import DataError, RowError
from data_tools.examples import Example, Reading
from data_tools.folders import PreparedFolder, is_prepared
from data_tools.readers import read_chunks, resolve_inputs
from data_tools.tool_lists import fields_of
from data_tools.values import dumps
from megatron_rest.regions import region_spans

MOST_SOURCE = 4000  # characters of a source row that are shown
_RESET, _BOLD, _DIM = "\x1b[0m", "\x1b[1m", "\x1b[2m"
# by the number of the region: CONTEXT, FORMAT, THINK, TOOL_NAME, TOOL_ARGS, RESPONSE
_COLOURS = ("\x1b[2m", "\x1b[90m", "\x1b[36m", "\x1b[1;33m", "\x1b[32m", "\x1b[35m")
_NAMES = ("context", "format", "think", "tool name", "tool args", "response")


def show_rows(
    path: str, *, first: int, count: int, colour: bool, reading: Reading, split: str = "", sources: Sequence[str] = ()
) -> Iterator[str]:
    """Texts of ``count`` rows from row ``first``, of a prepared folder or of raw rows, each beside its source row.

    ``sources``: what a prepared folder was made of, which it does not hold.
    """
    rows = _prepared_rows(path, sources, split) if is_prepared(path) else _raw_rows(path, reading, split)
    shown = False
    for title, source, found in islice(rows, first, first + count):
        shown = True
        result = "\n".join(row if isinstance(row, str) else show(row, colour=colour) for row in found)
        came = "" if source is None else f"{_paint('[source row]', _BOLD, colour)}\n{_pretty(source)}\n\n"
        yield f"{_paint(title, _BOLD, colour)}\n{came}{result}"
    if not shown:
        raise DataError(f"{path} has no row {first}")


def _pretty(row: Any) -> str:
    text = json.dumps(row, indent=1, ensure_ascii=False, default=str)
    return text if len(text) <= MOST_SOURCE else f"{text[:MOST_SOURCE]} ... ({len(text)} characters)"


_MOST_METADATA = 400  # characters that are shown

_Shown = tuple[str, Any, list[dict[str, Any] | str]]
"""(title, source row or None, what became of it)."""


def _prepared_rows(path: str, sources: Sequence[str], split: str) -> Iterator[_Shown]:
    lookup = _SourceRows(sources, split)
    for batch in PreparedFolder(path).batches():
        for values in (row for start in range(batch.num_rows) for row in batch.slice(start, 1).to_pylist()):
            title = f"{values['source_file']} row {values['source_row']}  prompt_id {values['prompt_id']}"
            tokens = f"  {len(values['prompt_token_ids'])} + {len(values['answer_token_ids'])} tokens"
            row = {name: json.loads(values[name]) for name in ("messages", "tools", "calls", "metadata")}
            regions = (values["answer_region_ends"], values["answer_region_ids"])
            source = lookup.find(values["source_file"], values["source_row"]) if sources else None
            yield title + tokens, source, [{**row, "answer": values["answer_text"], "regions": regions}]


class _SourceRows:
    """Rows of the inputs, asked for in their order."""

    def __init__(self, paths: Sequence[str], split: str) -> None:
        inputs = resolve_inputs(paths, split=split) if paths else []
        self._rows = ((chunk.source, n, row) for chunk in read_chunks(inputs) for n, row in chunk.rows())
        self._last: tuple[str, int, Any] = ("", -1, None)

    def find(self, source: str, number: int) -> Any:
        while self._last[:2] != (source, number):
            try:
                self._last = next(self._rows)
            except StopIteration:
                raise DataError(f"--source holds no {source} row {number}: was the folder made of it?") from None
        return self._last[2]


def _raw_rows(path: str, reading: Reading, split: str) -> Iterator[_Shown]:
    for chunk in read_chunks(resolve_inputs([path], split=split)):
        for number, row in chunk.rows():
            source = None if isinstance(row, RowError) else row
            try:
                examples = examples_of_row(row, reading)
            except RowError as error:
                yield chunk.place(number), source, [f"cannot be used: {error}\n"]
                continue
            layouts = ", ".join(dict.fromkeys(example.layout for example in examples))
            title = f"{chunk.place(number)}  layout {layouts}"
            yield title, source, [_shown(example) for example in examples] or ["the adapter leaves it out\n"]


def _shown(example: Example) -> dict[str, Any]:
    return {
        "messages": example.messages,
        "tools": example.tools,
        "calls": example.calls,
        "metadata": json.loads(example.metadata_json),
        "answer": example.ground_truth,
        "regions": region_spans(example.ground_truth.encode()),
        "remarks": [*example.notes, *(f"suspicious: {problem}" for problem in example.problems)],
    }


def show(row: dict[str, Any], *, colour: bool) -> str:
    """Messages, tools and answer of one row."""
    lines = []
    for message in row["messages"]:
        lines += [_paint(f"[{message['role']}]", _BOLD, colour), message["content"], ""]
    lines.append(_paint(f"[tools] {len(row['tools'])}", _BOLD, colour))
    for tool in row["tools"]:
        names = ", ".join(fields_of(tool["parameters"])[0]) if isinstance(tool["parameters"], dict) else "?"
        lines.append(f"  {tool['name']}({names})")
    lines += ["", _paint(f"[reference answer] {len(row['calls'])} calls", _BOLD, colour)]
    lines.append(colour_answer(row["answer"], *row["regions"]) if colour else row["answer"])
    if not colour:
        lines += [f"  call: {dumps(call)}" for call in row["calls"]]
    if row["metadata"]:
        text = dumps(row["metadata"])
        lines.append(f"[metadata] {text[:_MOST_METADATA]}{' ...' if len(text) > _MOST_METADATA else ''}")
    lines += [f"  {remark}" for remark in row.get("remarks", [])]
    return "\n".join(lines) + "\n"


def colour_answer(text: str, ends: Sequence[int], region_ids: Sequence[int]) -> str:
    """The answer with a colour per region."""
    data = text.encode()
    painted = [
        _COLOURS[region] + data[start:end].decode(errors="replace") + _RESET
        for region, (start, end) in zip(region_ids, pairwise((0, *ends)), strict=True)
    ]
    legend = "  ".join(f"{colour}{name}{_RESET}" for colour, name in zip(_COLOURS, _NAMES, strict=True))
    return "".join(painted) + f"\n{_DIM}regions:{_RESET} {legend}"


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_RESET}" if colour else text
