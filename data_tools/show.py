"""One row as a person wants to see it: messages, tools, and the reference answer coloured by regions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

from data_tools.answers import dumps
from data_tools.errors import DataError, RowError
from data_tools.folders import PreparedFolder, is_prepared
from data_tools.layouts import Columns, normalise
from data_tools.readers import read_chunks, resolve_inputs
from megatron_rest.regions import region_spans

_RESET, _BOLD, _DIM = "\x1b[0m", "\x1b[1m", "\x1b[2m"
# by the number of the region: CONTEXT, FORMAT, THINK, TOOL_NAME, TOOL_ARGS, RESPONSE
_COLOURS = ("\x1b[2m", "\x1b[90m", "\x1b[36m", "\x1b[1;33m", "\x1b[32m", "\x1b[35m")
_NAMES = ("context", "format", "think", "tool name", "tool args", "response")


def show_rows(
    path: str, *, first: int, count: int, colour: bool, columns: Columns | None = None, split: str = ""
) -> Iterator[str]:
    """Texts of ``count`` rows from row ``first``, of a prepared folder or of raw rows."""
    rows = _prepared_rows(path) if is_prepared(path) else _raw_rows(path, columns, split)
    shown = False
    for title, row in islice(rows, first, first + count):
        shown = True
        yield f"{_paint(title, _BOLD, colour)}\n{row if isinstance(row, str) else show(row, colour=colour)}"
    if not shown:
        raise DataError(f"{path} has no row {first}")


def _prepared_rows(path: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for batch in PreparedFolder(path).batches():
        for values in (row for start in range(batch.num_rows) for row in batch.slice(start, 1).to_pylist()):
            title = f"{values['source_file']} row {values['source_row']}  prompt_id {values['prompt_id']}"
            tokens = f"  {len(values['prompt_token_ids'])} + {len(values['answer_token_ids'])} tokens"
            row = {name: json.loads(values[name]) for name in ("messages", "tools", "calls")}
            regions = (values["answer_region_ends"], values["answer_region_ids"])
            yield title + tokens, {**row, "answer": values["answer_text"], "regions": regions}


def _raw_rows(path: str, columns: Columns | None, split: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for chunk in read_chunks(resolve_inputs([path], split=split)):
        for number, row in chunk.rows():
            title = f"{chunk.source} row {number}"
            try:
                if isinstance(row, RowError):
                    raise row
                example = normalise(row, columns)
            except RowError as error:
                yield title, f"cannot be used: {error}\n{str(row)[:2000]}"
                continue
            yield (
                title,
                {
                    "messages": example.messages,
                    "tools": example.tools,
                    "calls": example.calls,
                    "answer": example.ground_truth,
                    "regions": region_spans(example.ground_truth.encode()),
                },
            )


def show(row: dict[str, Any], *, colour: bool) -> str:
    """Messages, tools and answer of one row."""
    lines = []
    for message in row["messages"]:
        lines += [_paint(f"[{message['role']}]", _BOLD, colour), message["content"], ""]
    lines.append(_paint(f"[tools] {len(row['tools'])}", _BOLD, colour))
    for tool in row["tools"]:
        names = ", ".join(tool["parameters"]) if isinstance(tool["parameters"], dict) else "?"
        lines.append(f"  {tool['name']}({names})")
    lines += ["", _paint(f"[reference answer] {len(row['calls'])} calls", _BOLD, colour)]
    lines.append(colour_answer(row["answer"], *row["regions"]) if colour else row["answer"])
    if not colour:
        lines += [f"  call: {dumps(call)}" for call in row["calls"]]
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
