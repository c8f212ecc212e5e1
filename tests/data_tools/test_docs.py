"""Every example of docs/data.md does what the page says."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from data_tools.answers import PLACEHOLDER_THOUGHT
from data_tools.cli import main
from data_tools.examples import normalise
from megatron_rest.data.prompt_files import PROMPT_SCHEMA
from tests.data_tools.test_forms import LINES, ROWS, TABLE, write_ipc

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def table(heading: str) -> list[list[str]]:
    """Cells of the table under a header row."""
    rows = PAGE[PAGE.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def commands(text: str) -> list[list[str]]:
    return [
        shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("megatron-rest-data ")
    ]


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the repository's samples and a tokenizer called TOK."""
    (tmp_path / "data_tools").symlink_to(ROOT / "data_tools")
    (tmp_path / "TOK").symlink_to(tokenizer_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_schema_table_is_the_schema() -> None:
    listed = [
        (name, kind.removesuffix(" or null").replace("\\", ""), kind.endswith("null"))
        for names, kinds, _ in table("| column | type | meaning |")
        for name, kind in zip(names.split(", "), kinds.split(", "), strict=False)
    ]
    listed = [*listed, ("calls", "string", False)]  # tools and calls share one type in the table
    actual = [(field.name, str(field.type).replace("item: ", ""), field.nullable) for field in PROMPT_SCHEMA]
    assert sorted(listed) == sorted(actual)


def test_first_commands_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "TOK").unlink()
    (folder / "api_bank").mkdir()
    item = {"system": "s", "user": ROWS[0]["prompt"][1]["content"], "answer": {"name": "f", "parameters": {}}}
    (folder / "api_bank" / "level-2.json").write_text(json.dumps([item]))
    question = [[{"role": "user", "content": "Who wrote the book about four dogs?"}]]
    (folder / "BFCL_v4_simple_python.json").write_text(json.dumps({"id": "simple_0", "question": question}) + "\n")
    for command in commands(PAGE.split("```")[1]):
        assert main(command) == 0, capsys.readouterr().err
    for name in ("TOK/tokenizer.json", "OUT.png", "PARTS/train/manifest.json", "PARTS/test/manifest.json"):
        assert (folder / name).is_file()
    assert json.loads((folder / "CLEAN" / "manifest.json").read_text())["counts"]["rows_in"] == 229


def save_datasets(folder: Path) -> None:
    import datasets

    dataset = datasets.Dataset(TABLE)
    dataset.save_to_disk(folder / "my_dataset")
    datasets.DatasetDict(train=dataset, test=dataset.select(range(5))).save_to_disk(folder / "my_splits")


def save_shards(folder: Path) -> None:
    (folder / "shards").mkdir()
    for part in range(2):
        pq.write_table(TABLE.slice(part * 25, 25), folder / "shards" / f"part-{part}.parquet")


def test_every_form_of_the_table_converts(folder: Path) -> None:
    (folder / "data").mkdir()
    write: dict[str, Callable[[Path], Any]] = {
        "stream.arrow": lambda p: write_ipc(p, stream=True),
        "rows.arrow": lambda p: write_ipc(p, stream=False, compression="zstd"),
        "rows.feather": lambda p: feather.write_feather(TABLE, str(p)),
        "data/train-00000-of-00004.parquet": lambda p: pq.write_table(TABLE, p),
        "rows.jsonl": lambda p: p.write_bytes(LINES),
        "rows.json": lambda p: p.write_text(json.dumps(ROWS)),
        "rows.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES)),
    }
    for name, writer in write.items():
        writer(folder / name)
    save_datasets(folder)
    save_shards(folder)
    ids: dict[str, list[str]] = {}
    for form, example in table("| form | example |"):
        options = shlex.split(example.strip("`"))
        assert main(["convert", *options, "--output", "OUT", "--tokenizer", "TOK", "--overwrite"]) == 0, form
        ids[form] = pa.ipc.open_file(folder / "OUT" / "data-00000.arrow").read_all()["prompt_id"].to_pylist()
    expected = [normalise(row).prompt_id for row in ROWS]
    assert len(ids) == 11
    for form, found in ids.items():
        assert found == (expected * 2 if form == "a quoted glob, several inputs" else expected), form


def test_layouts_are_the_same_row() -> None:
    examples = [normalise(json.loads(line)) for line in blocks("json")[0].splitlines()]
    assert len(examples) == 5
    for example in examples:
        assert example.messages == examples[0].messages
        assert example.tools == examples[0].tools
        assert example.calls == [{"name": "weather", "parameters": {"city": "Bern"}}]
    thoughts = ["Ask.", "Ask.", "Ask.", PLACEHOLDER_THOUGHT, "Ask."]
    assert [example.think for example in examples] == thoughts


def test_own_format_by_names(folder: Path) -> None:
    (folder / "columns.yaml").write_text(blocks("yaml")[0])
    (folder / "rows.jsonl").write_text(blocks("json")[1])
    (inline,) = re.findall(r"`(megatron-rest-data convert [^`]*--map columns.yaml)`", PAGE)
    assert main(*commands(inline)) == 0
    (row,) = pa.ipc.open_file(folder / "OUT" / "data-00000.arrow").read_all().to_pylist()
    assert json.loads(row["calls"]) == [{"name": "weather", "parameters": {"city": "Bern"}}]
    assert row["ground_truth"].startswith("<think> Ask. </think>")
    assert "Weather in Bern?" in json.loads(row["messages"])[1]["content"]


def test_own_format_by_a_loop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("python")[0]
    assert len(code.splitlines()) <= 20
    (folder / "raw.txt").write_text('What is 1+1?\tadd\t{"a": 1, "b": 1}\nAnd 2+2?\tadd\t{"a": 2, "b": 2}\n')
    exec(compile(code, "docs/data.md", "exec"), {})
    assert main(["validate", "rows.jsonl"]) == 0
    assert "2 rows, 0 of them cannot be used" in capsys.readouterr().out


def test_reading_example(folder: Path) -> None:
    command = ["convert", "--input", "data_tools/samples/test.parquet", "--output", "OUT", "--tokenizer", "TOK"]
    assert main(command) == 0
    code = blocks("python")[1]
    names: dict[str, Any] = {"step": 1, "dp_rank": 1, "dp_size": 2}
    exec(compile(code, "docs/data.md", "exec"), names)
    assert len(names["data"]) + names["data"].num_left_out == 50
    assert names["mine"] == names["rows"][1::2]
    assert len(names["rows"]) == 16
