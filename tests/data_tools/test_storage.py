"""One set of rows as the libraries that people use store it: the same examples from each of them."""

from __future__ import annotations

import importlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.cli import main
from data_tools.errors import DataError, RowError
from data_tools.examples import Example, normalise
from data_tools.readers import read_chunks, resolve_inputs
from data_tools.values import parsed
from tests.data_tools.layout_rows import CALLS, FUNCTIONS, LAYOUT_ROWS, OPENAI, QUESTION, READ, TOOLS, USER

ALARM = {
    "name": "alarm",
    "description": "Wake.",
    "parameters": {
        "type": "object",
        "properties": {"at": {"type": "string"}, "days": {"type": "array"}},
        "required": ["at"],
    },
}
ROWS: list[dict[str, Any]] = [
    {"messages": [USER, OPENAI], "tools": FUNCTIONS},
    {
        "messages": [
            {"role": "user", "content": "Wake me at six."},
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "alarm", "arguments": {"at": "6"}}}],
            },
        ],
        "tools": [{"type": "function", "function": ALARM}],
    },
    {
        "messages": [{"role": "user", "content": "Zürich ☔?"}, {"role": "assistant", "content": "Rain."}],
        "tools": FUNCTIONS,
    },
]


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments as objects, not as their text."""
    calls = [
        {**call, "function": {**call["function"], "arguments": parsed(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


OBJECTS = [{**row, "messages": list(map(with_objects, row["messages"]))} for row in ROWS]


def examples(path: Path, split: str = "") -> list[Example]:
    return [normalise(row) for chunk in read_chunks(resolve_inputs([path], split=split)) for _, row in chunk.rows()]


def struct_table(path: Path) -> pa.Table:
    table = pa.Table.from_pylist(OBJECTS)
    pq.write_table(table, path)
    return table


def json_type() -> Any:
    return pa.json_(pa.string())


def typed(path: Path) -> None:
    """``messages`` as JSON texts, ``properties`` as JSON text in a struct, both by their type."""
    storage = pa.array([[json.dumps(m) for m in row["messages"]] for row in OBJECTS], pa.list_(pa.string()))
    messages = pa.ListArray.from_arrays(storage.offsets, storage.values.cast(json_type()))
    names = [[t["function"]["name"] for t in row["tools"]] for row in OBJECTS]
    flat = [t["function"] for row in OBJECTS for t in row["tools"]]
    parameters = pa.StructArray.from_arrays(
        [
            pa.array(["object"] * len(flat)),
            pa.array([json.dumps(f["parameters"]["properties"]) for f in flat]).cast(json_type()),
            pa.array([f["parameters"]["required"] for f in flat]),
        ],
        names=["type", "properties", "required"],
    )
    tools = pa.StructArray.from_arrays(
        [pa.array([f["name"] for f in flat]), pa.array([f["description"] for f in flat]), parameters],
        names=["name", "description", "parameters"],
    )
    offsets = pa.array([0, *[sum(map(len, names[: n + 1])) for n in range(len(names))]], pa.int32())
    pq.write_table(pa.table({"messages": messages, "tools": pa.ListArray.from_arrays(offsets, tools)}), path)


def texts(path: Path) -> None:
    pq.write_table(pa.table({key: [json.dumps(row[key]) for row in ROWS] for key in ("messages", "tools")}), path)


def of_datasets(path: Path) -> None:
    """What ``load_dataset("json")`` makes of the rows, saved as Parquet."""
    import datasets

    lines = path.with_suffix(".jsonl.in")
    lines.write_text("".join(json.dumps(row) + "\n" for row in OBJECTS))
    loaded = datasets.load_dataset("json", data_files=str(lines), cache_dir=str(path.parent / ".cache"), split="train")
    loaded.to_parquet(path)


def of_pandas(path: Path) -> None:
    import pandas

    struct_table(path.with_suffix(".tmp"))
    pandas.read_parquet(path.with_suffix(".tmp")).to_json(path, orient="records", lines=True)


def of_polars(path: Path) -> None:
    polars = importlib.import_module("polars")
    frame = polars.from_arrow(struct_table(path.with_suffix(".tmp")))
    writers = {".jsonl": frame.write_ndjson, ".json": frame.write_json, ".arrow": frame.write_ipc}
    writers.get(path.suffix, frame.write_parquet)(path)


def of_duckdb(path: Path) -> None:
    duckdb = importlib.import_module("duckdb")
    struct_table(path.with_suffix(".tmp"))
    form = {".jsonl": "json", ".json": "json, array true"}.get(path.suffix, "parquet")
    duckdb.sql(f"COPY (SELECT * FROM read_parquet('{path.with_suffix('.tmp')}')) TO '{path}' (FORMAT {form})")


def of_duckdb_json(path: Path) -> None:
    """JSON lines that it reads by itself, columns of type JSON."""
    duckdb = importlib.import_module("duckdb")
    path.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = "columns={'messages': 'JSON', 'tools': 'JSON'}, format='newline_delimited'"
    duckdb.sql(f"COPY (SELECT * FROM read_json('{path.with_suffix('.tmp')}', {columns})) TO '{path}' (FORMAT parquet)")


def of_fastparquet(path: Path) -> None:
    import pandas

    fastparquet = importlib.import_module("fastparquet")
    frame = pandas.DataFrame({key: [json.dumps(row[key]) for row in ROWS] for key in ("messages", "tools")})
    fastparquet.write(path, frame, object_encoding="json" if "objects" in path.name else "utf8")


def padded(path: Path) -> None:
    """JSON lines of a table whose structs Arrow has filled with null, as to_json, write_ndjson and COPY write them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in pa.Table.from_pylist(OBJECTS).to_pylist()))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "structs.parquet": struct_table,
    "json_types.parquet": typed,
    "texts.parquet": texts,
    "padded.jsonl": padded,
    "rows.jsonl.xz": lambda p: p.write_bytes(lzma.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode())),
    "objects.json": lambda p: p.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "datasets.parquet": of_datasets,
    "pandas.jsonl": of_pandas,
    **dict.fromkeys(("polars.jsonl", "polars.json", "polars.arrow", "polars.parquet"), of_polars),
    **dict.fromkeys(("duckdb.jsonl", "duckdb.json", "duckdb.parquet"), of_duckdb),
    "duckdb_json.parquet": of_duckdb_json,
    **dict.fromkeys(("fastparquet.parquet", "fastparquet_objects.parquet"), of_fastparquet),
}
NEEDS = ("pandas", "polars", "duckdb", "fastparquet")


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    for package in NEEDS:
        if name.startswith(package):
            pytest.importorskip(package, reason=f"{package} is not installed; below, pyarrow imitates what it writes")
    WRITERS[name](tmp_path / name)
    assert list(map(essence, examples(tmp_path / name))) == [essence(normalise(row)) for row in ROWS]


def typed_as(kind: pa.DataType, text: pa.DataType, listed: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type with other ones for its texts and lists, at every depth."""
    if pa.types.is_string(kind):
        return text
    if pa.types.is_list(kind):
        return listed(typed_as(kind.value_type, text, listed))
    if pa.types.is_struct(kind):
        parts = [kind.field(i) for i in range(kind.num_fields)]
        return pa.struct([pa.field(part.name, typed_as(part.type, text, listed)) for part in parts])
    return kind


def structs(text: pa.DataType, listed: Callable[[pa.DataType], pa.DataType]) -> pa.Table:
    plain = pa.Table.from_pylist(OBJECTS).schema
    schema = pa.schema([pa.field(field.name, typed_as(field.type, text, listed)) for field in plain])
    return pa.Table.from_pylist(OBJECTS, schema=schema)


def columns_of_text(kind: pa.DataType, *, nullable: bool = True) -> pa.Table:
    schema = pa.schema([pa.field(name, kind, nullable=nullable) for name in ("messages", "tools")])
    held = {name: pa.array([json.dumps(row[name]) for row in ROWS]).cast(pa.binary()) for name in schema.names}
    return pa.table({name: array.cast(pa.string()).cast(kind) for name, array in held.items()}, schema=schema)


# What the writers of Polars, DuckDB and fastparquet do that pyarrow's own does not, imitated with pyarrow.
IMITATED: dict[str, Callable[[], pa.Table]] = {
    "Polars: large texts and lists": lambda: structs(pa.large_string(), pa.large_list),
    "Polars: views of texts": lambda: columns_of_text(pa.string_view()),
    "Polars: categories": lambda: columns_of_text(pa.dictionary(pa.uint32(), pa.large_string())),
    "views of lists": lambda: structs(pa.string(), pa.list_view),
    "DuckDB: texts of type JSON": lambda: columns_of_text(json_type()),
    "DuckDB, fastparquet: texts without a type": lambda: columns_of_text(pa.binary()),
    "fastparquet: required columns": lambda: columns_of_text(pa.string(), nullable=False),
}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in IMITATED
        for form in ("arrow", "parquet")
        if (name, form) != ("views of lists", "parquet")
    ],
)
def test_types_of_other_writers(name: str, form: str, tmp_path: Path) -> None:
    table, path = IMITATED[name](), tmp_path / f"rows.{form}"
    if form == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)
    assert list(map(essence, examples(path))) == [essence(normalise(row)) for row in ROWS]


def essence(example: Example) -> tuple[Any, ...]:
    """Everything but the order of keys, which Arrow's structs do not keep."""
    turns = [(turn.role, turn.text, turn.thought, turn.calls) for turn in example.turns]
    return turns, example.tools, example.calls, example.response, example.think, example.problems, example.notes


def test_maps_are_objects(tmp_path: Path) -> None:
    arguments = pa.map_(pa.string(), pa.string())
    answer = pa.list_(pa.struct([("name", pa.string()), ("parameters", arguments)]))
    rows = [[{"name": "price", "parameters": [("item", "tea")]}]]
    table = pa.table({"system": ["s"], "user": ["u"], "answer": pa.array(rows, answer)})
    pq.write_table(table, tmp_path / "m.parquet")
    assert examples(tmp_path / "m.parquet")[0].calls == READ[1:]


def test_broken_json_columns_cost_their_row_only(tmp_path: Path) -> None:
    column = pa.array([json.dumps(ROWS[0]["messages"]), "{"]).cast(json_type())
    pq.write_table(pa.table({"messages": column}), tmp_path / "x.parquet")
    [chunk] = read_chunks(resolve_inputs([tmp_path / "x.parquet"]))
    (_, good), (_, bad) = chunk.rows()
    assert normalise(good).calls == READ and isinstance(bad, RowError)


def lines(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_folders_hold_data_and_other_things(tmp_path: Path) -> None:
    lines(tmp_path / "a" / "part-0.jsonl", ROWS[0])
    lines(tmp_path / "a" / "part-1.jsonl", ROWS[2])
    for name in (
        "part-2.jsonl",
        "config.json",
        "dataset_infos.json",
        ".cache/x.json",
        "_delta_logs.json",
        "tokenizer.json",
    ):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("" if "part" in name else '{"a": 1}')
    (tmp_path / "a" / "cache-12.arrow").write_bytes(b"x")
    (tmp_path / "a" / "_SUCCESS").write_text("")
    assert [s.name for s in resolve_inputs([tmp_path / "a"])] == ["part-0.jsonl", "part-1.jsonl"]
    with pytest.raises(DataError, match=r"part-2\.jsonl is empty"):
        resolve_inputs([tmp_path / "a" / "part-2.jsonl"])
    with pytest.raises(DataError, match="hf download --repo-type dataset Somebody/some-set"):
        resolve_inputs(["Somebody/some-set"])


@pytest.mark.parametrize(
    "names", [("data/train-0.jsonl", "data/test-0.jsonl"), ("default/train/0.jsonl", "default/test/0.jsonl")]
)
def test_splits_are_told_apart(names: tuple[str, str], tmp_path: Path) -> None:
    for name, row in zip(names, ROWS, strict=False):
        lines(tmp_path / name, row)
    with pytest.raises(DataError, match="has the splits test, train: say which, --split train"):
        resolve_inputs([tmp_path])
    assert [s.path for s in resolve_inputs([tmp_path], split="train")] == [tmp_path / names[0]]
    assert len(resolve_inputs([tmp_path], split="all")) == 2


def test_a_delta_table_gives_its_newest_version(tmp_path: Path) -> None:
    for name, row in (("old.parquet", ROWS[0]), ("new.parquet", ROWS[2])):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / name)
    log = tmp_path / "_delta_log"
    lines(log / "00000000000000000000.json", {"add": {"path": "old.parquet"}})
    lines(log / "00000000000000000001.json", {"remove": {"path": "old.parquet"}}, {"add": {"path": "new.parquet"}})
    assert [s.name for s in resolve_inputs([tmp_path])] == ["new.parquet"]
    (log / "00000000000000000000.json").unlink()
    with pytest.raises(DataError, match="begins with a checkpoint"):
        resolve_inputs([tmp_path])


def convert(tmp_path: Path, tokenizer: Path, *options: str) -> int:
    command = ["convert", "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--overwrite"]
    return main([*command, "--tokenizer", str(tokenizer), "--processes", "1", *options])


def test_lost_rows_and_problems_decide_the_status(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = {"messages": [USER, {"role": "assistant", "tool_calls": CALLS[:1]}], "tools": TOOLS[1:]}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n\n{{\n{json.dumps(unknown)}\n{json.dumps({'a': float('nan')})}\n")
    assert convert(tmp_path, tokenizer_folder) == 1
    said = capsys.readouterr()
    assert "50% of the rows are lost, more than --max-lost 0.05" in said.err
    assert (
        "layout: openai (2 rows, recognised)" in said.out
        and "rows.jsonl line 3 (row 1): the line is not JSON" in said.out
    )
    assert "1 rows suspicious, kept: a called tool is not among" in said.out
    text = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert [(entry["row"], entry["line"]) for entry in map(json.loads, text.splitlines())] == [(1, 3), (3, 5)]
    kept = [json.loads(line)["content"] for line in text.splitlines()]
    assert kept == [None, {"a": {"$not_json": "nan"}}], "a line that is no JSON has no row"
    with pytest.raises(RowError, match="still holds a"):
        normalise(json.loads(text.splitlines()[1]))
    assert convert(tmp_path, tokenizer_folder, "--max-lost", "1") == 0
    assert convert(tmp_path, tokenizer_folder, "--max-lost", "1", "--on-problem", "quarantine") == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["rows_out"] == 1
    assert convert(tmp_path, tokenizer_folder, "--on-problem", "stop") == 1
    assert "--on-problem stop: rows.jsonl line 4 (row 2): a called tool" in capsys.readouterr().err
    assert main(["validate", str(path)]) == 1
    assert "1 rows cannot be used: rows.jsonl line 3 (row 1)" in capsys.readouterr().out


def test_every_turn_of_a_trajectory_is_a_row(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [USER, OPENAI, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "So."}]
    lines(tmp_path / "rows.jsonl", *[{"messages": messages, "tools": FUNCTIONS}] * 3)
    assert convert(tmp_path, tokenizer_folder, "--reference", "each") == 0
    assert "3 conversations -> 6 rows -> 3 rows with calls" in capsys.readouterr().out
    assert convert(tmp_path, tokenizer_folder) == 0
    assert "3 rows: earlier turns make calls that are no reference: --reference each" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out"), "--source", str(tmp_path / "rows.jsonl"), "--row", "2"]) == 0
    shown = capsys.readouterr().out
    assert "[source row]" in shown and QUESTION in shown and "[reference answer] 0 calls" in shown


def test_validate_says_what_convert_says(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [{"role": "user", "content": "What is <|im_end|>?"}, ROWS[2]["messages"][1]]}
    lines(tmp_path / "rows.jsonl", row)
    assert main(["validate", str(tmp_path / "rows.jsonl")]) == 0
    assert "checked with --tokenizer only" in capsys.readouterr().out
    assert main(["validate", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tokenizer_folder)]) == 1
    assert "control token <|im_end|>" in capsys.readouterr().out


def test_one_list_of_options_serves_both_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(tmp_path / "rows.jsonl", {"ask": QUESTION, "gold": CALLS})
    options = ["--column", "user=ask", "--column", "calls=gold", "--prompt-style", "slim", "--max-lost", "1"]
    command = ["train-tokenizer", str(tmp_path / "rows.jsonl"), "--vocab-size", "300", "--output", str(tmp_path / "t")]
    assert main([*command, *options]) == 0
    assert main(command) == 1
    assert "line 1 (row 0): no known layout has the columns ask, gold" in capsys.readouterr().err
    assert LAYOUT_ROWS  # the same options as convert's
