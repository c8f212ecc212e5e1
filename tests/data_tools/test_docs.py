"""Every example of docs/data.md does what the page says."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from data_tools.answers import PLACEHOLDER_THOUGHT
from data_tools.cli import _CONVERT, main
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
        "objects.json": lambda p: p.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
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
    assert len(ids) == 12
    for form, found in ids.items():
        assert found == (expected * 2 if form == "a quoted glob, several inputs" else expected), form


def test_layouts_are_the_same_row() -> None:
    examples = [normalise(json.loads(line)) for line in blocks("json")[0].splitlines()]
    assert len(examples) == 5
    for example in examples:
        assert example.messages == examples[0].messages
        assert example.tools == examples[0].tools
        assert example.calls == [{"name": "weather", "parameters": {"city": "Bern"}}]
    assert [example.layout for example in examples] == ["verl", "openai", "hermes-v1", "xlam", "io"]
    thoughts = ["Ask.", "Ask.", "Ask.", PLACEHOLDER_THOUGHT, "Ask."]
    assert [example.think for example in examples] == thoughts


def inline(ending: str) -> list[str]:
    """The command of the page that ends so."""
    [command] = re.findall(rf"`(megatron-rest-data convert [^`]*{re.escape(ending)})`", PAGE)
    return commands(command)[0]


def test_own_format_by_names(folder: Path) -> None:
    assert len(blocks("yaml")[0].splitlines()) <= 10
    (folder / "columns.yaml").write_text(blocks("yaml")[0])
    (folder / "rows.jsonl").write_text(blocks("json")[1])
    assert main(inline("--mapping columns.yaml")) == 0
    (row,) = pa.ipc.open_file(folder / "OUT" / "data-00000.arrow").read_all().to_pylist()
    assert json.loads(row["calls"]) == [{"name": "weather", "parameters": {"city": "Bern"}}]
    assert json.loads(row["tools"])[0]["name"] == "weather"
    assert row["ground_truth"].startswith("<think> Ask. </think>")
    assert "Weather in Bern?" in json.loads(row["messages"])[1]["content"]


def test_own_format_by_an_adapter(folder: Path) -> None:
    (folder / "rows.py").write_text(blocks("python")[0])
    raw = [{"ask": f"What is {n}+{n}?", "wanted": f'add {{"a": {n}}}', "apis": [{"name": "add"}]} for n in (1, 2)]
    (folder / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    assert main(inline("--adapter rows.py:convert")) == 0
    rows = pa.ipc.open_file(folder / "OUT" / "data-00000.arrow").read_all().to_pylist()
    assert [json.loads(row["calls"])[0]["parameters"] for row in rows] == [{"a": 1}, {"a": 2}]
    adapter = json.loads((folder / "OUT" / "manifest.json").read_text())["options"]["reading"]["adapter"]
    assert adapter["sha256"] == hashlib.sha256((folder / "rows.py").read_bytes()).hexdigest()


def test_the_examples_of_help_work_by_copy_and_paste(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"chat": {"question": "1?"}, "gold": [{"name": "f", "arguments": {}}], "meta": {"tools": [{"name": "f"}]}}]
    asks = [{"q": "1?", "tool": "f", "args": {}, "tools": [{"name": "f"}]}]
    text = _CONVERT.replace("\\\n", " ")
    for rows_of_it, option in ((rows, "--mapping map.yaml"), (asks, "--adapter rows.py:convert")):
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_it))
        [write] = [line for line in text.splitlines() if "printf" in line and option.split()[1].split(":")[0] in line]
        subprocess.run(["sh", "-c", write], check=True)
        [command] = [line.strip() for line in text.splitlines() if line.endswith(option)]
        assert main([*commands(command)[0], "--overwrite"]) == 0, capsys.readouterr().err


def test_reading_example(folder: Path) -> None:
    command = ["convert", "--input", "data_tools/samples/test.parquet", "--output", "OUT", "--tokenizer", "TOK"]
    assert main(command) == 0
    code = blocks("python")[1]
    names: dict[str, Any] = {"step": 1, "dp_rank": 1, "dp_size": 2}
    exec(compile(code, "docs/data.md", "exec"), names)
    assert len(names["data"]) + names["data"].num_left_out == 50
    assert names["mine"] == names["rows"][1::2]
    assert len(names["rows"]) == 16
