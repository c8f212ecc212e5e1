"""All stored forms, written by the real writers, give the same rows; what cannot be read is refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from data_tools.errors import DataError, RowError
from data_tools.examples import normalise
from data_tools.readers import chunk as chunk_module
from data_tools.readers import count_rows, read_chunks, resolve_inputs
from data_tools.readers import sources as sources_module
from tests.data_tools.conftest import SAMPLES

Rows = list[dict[str, Any]]
TABLE = pq.read_table(SAMPLES / "test.parquet")
ROWS: Rows = TABLE.to_pylist()
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(*paths: str | Path, split: str = "") -> Rows:
    sources = resolve_inputs(list(paths), split=split)
    rows = [row for chunk in read_chunks(sources) for _, row in chunk.rows()]
    assert sum(count_rows(source) for source in sources) == len(rows)
    return rows


def ids(rows: Rows) -> list[tuple[str, str]]:
    return [(normalise(row).prompt_id, normalise(row).ground_truth) for row in rows]


def write_ipc(path: Path, *, stream: bool, compression: str | None = None) -> None:
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(path, TABLE.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(TABLE, max_chunksize=7)


def write_compressed(path: Path, codec: str, data: bytes) -> None:
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write(data)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "stream.arrow": lambda p: write_ipc(p, stream=True),
    "file.arrow": lambda p: write_ipc(p, stream=False),
    "file_zstd.arrow": lambda p: write_ipc(p, stream=False, compression="zstd"),
    "feather_lz4.feather": lambda p: feather.write_feather(TABLE, str(p), compression="lz4"),
    "groups.parquet": lambda p: pq.write_table(TABLE, p, row_group_size=9),
    "lines.jsonl": lambda p: p.write_bytes(LINES),
    "lines_bom_crlf.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n").rstrip()),
    "list.json": lambda p: p.write_text(json.dumps(ROWS)),
    "pretty.json": lambda p: p.write_text("\n " + json.dumps(ROWS, indent=3, ensure_ascii=False) + "\n\n"),
    "wrong_name.parquet": lambda p: p.write_bytes(LINES),
    "lines.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES)),
    "members.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:])),
    "list.json.bz2": lambda p: p.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "lines.jsonl.zst": lambda p: write_compressed(p, "zstd", LINES),
    "lines.jsonl.lz4": lambda p: write_compressed(p, "lz4", LINES),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert ids(read(tmp_path / name)) == ids(ROWS)


def test_compressed_stream_gives_the_same_rows(tmp_path: Path) -> None:
    write_ipc(tmp_path / "s", stream=True)
    (tmp_path / "s.gz").write_bytes(gzip.compress((tmp_path / "s").read_bytes()))
    assert ids(read(tmp_path / "s.gz")) == ids(ROWS)


def test_hugging_face_folders_give_the_same_rows(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset(TABLE)
    dataset.save_to_disk(tmp_path / "one")
    dataset.save_to_disk(tmp_path / "sharded", num_shards=3)
    datasets.DatasetDict(train=dataset, test=dataset.select(range(5))).save_to_disk(tmp_path / "dict")
    dataset.to_parquet(tmp_path / "hf.parquet")
    dataset.to_json(tmp_path / "hf.jsonl")
    for name in ("one", "sharded", "hf.parquet", "hf.jsonl"):
        assert ids(read(tmp_path / name)) == ids(ROWS), name
    assert ids(read(tmp_path / "dict", split="train")) == ids(ROWS)
    assert len(read(tmp_path / "dict", split="all")) == 55
    with pytest.raises(DataError, match="has the splits train, test: say which, --split train"):
        read(tmp_path / "dict")
    with pytest.raises(DataError, match="no split 'dev', it has train, test"):
        read(tmp_path / "dict", split="dev")


def test_folders_and_globs_keep_a_fixed_order(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        rows = ROWS[index * 17 : (index + 1) * 17]
        (tmp_path / f"part-{index}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes.txt").write_text("not data")
    assert ids(read(tmp_path)) == ids(ROWS)
    assert ids(read(str(tmp_path / "part-*.jsonl"))) == ids(ROWS)
    assert [s.name for s in resolve_inputs([tmp_path])] == ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]
    with pytest.raises(DataError, match="given twice"):
        resolve_inputs([tmp_path, tmp_path / "part-0.jsonl"])


def test_nested_objects_of_different_shape_survive_arrow(tmp_path: Path) -> None:
    rows = [
        {"system": "s", "user": str(n), "answer": [{"name": "f", "parameters": parameters}]}
        for n, parameters in enumerate(({"a": 1}, {}, {"b": "x", "c": {"d": [1]}}))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ids(read(tmp_path / "t.parquet")) == ids(read(tmp_path / "t.jsonl"))


def test_text_that_is_not_utf8_spoils_its_row_only(tmp_path: Path) -> None:
    good, bad = LINES.splitlines()[0], LINES.splitlines()[1].replace(b'"role"', b'"r\xffle"')
    (tmp_path / "x.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good)
    rows = read(tmp_path / "x.jsonl")
    assert isinstance(rows[1], RowError)
    assert ids([rows[0], rows[2]]) == ids([ROWS[0], ROWS[0]])
    (tmp_path / "x.json").write_bytes(b"[" + good + b"," + good.replace(b"helpful", b"h\xff", 1) + b"]")
    with pytest.raises(RowError, match="not valid Unicode"):
        normalise(read(tmp_path / "x.json")[1])
    column = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    nested = pa.array([[{"role": b"user"}], [{"role": b"\xff"}]]).view(pa.list_(pa.struct([("role", pa.string())])))
    batch = pa.record_batch([column, nested], ["a", "b"])
    with pa.ipc.new_file(tmp_path / "x.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    rows = read(tmp_path / "x.arrow")
    assert rows[0] == {"a": "ok", "b": [{"role": "user"}]}
    assert isinstance(rows[1], RowError)


def test_lines_that_are_too_long_are_rows_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.readers.json_text.MAX_ROW_BYTES", 1000)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 5000 + b'"}\n{"c": 3}\n')
    rows = read(tmp_path / "x.jsonl")
    assert rows[0] == {"a": 1}
    assert isinstance(rows[1], RowError)
    assert rows[2] == {"c": 3}


def test_chunks_are_small_and_number_their_rows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n' * (chunk_module.CHUNK_ROWS * 2 + 3))
    chunks = list(read_chunks(resolve_inputs([tmp_path / "x.jsonl"])))
    assert [chunk.num_rows for chunk in chunks] == [chunk_module.CHUNK_ROWS] * 2 + [3]
    assert [chunk.first_row for chunk in chunks] == [0, chunk_module.CHUNK_ROWS, 2 * chunk_module.CHUNK_ROWS]


def test_row_groups_that_were_read_leave_the_memory(tmp_path: Path) -> None:
    table = pa.concat_tables([TABLE] * 200)
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=200, use_dictionary=False, compression="none")
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_chunks(resolve_inputs([tmp_path / "x.parquet"]))]
    assert len(held) > 15
    assert max(held) < 0.2 * table.nbytes


def test_a_chunk_takes_no_more_to_a_worker_than_its_rows(tmp_path: Path) -> None:
    table = pa.concat_tables([TABLE] * 40).combine_chunks()
    with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_batch(table.to_batches()[0])
    chunks = list(read_chunks(resolve_inputs([tmp_path / "x.arrow"])))
    assert [chunk.num_rows for chunk in chunks] == [512, 512, 512, 464]
    sent = [pickle.dumps(chunk) for chunk in chunks]
    assert max(map(len, sent)) < 0.3 * (tmp_path / "x.arrow").stat().st_size
    assert ids([row for data in sent for _, row in pickle.loads(data).rows()]) == ids(ROWS * 40)


REFUSED = {
    "Feather v1": b"FEA1xxxxxxxx",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zip archive": b"PK\x03\x04xxxx",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "is empty": b"",
    "no known form": b"a,b\n1,2\n",
    "truncated at row 2": b'{\n "a": 1\n}\n{\n "a": 2\n}\n{\n "a":',
    "tar archive": b"x" * 257 + b"ustar" + b"x" * 300,
    "truncated at row 1": b'[{"a": 1}, {"a": ',
    "after row 0": b'[{"a": 1} {"a": 2}]',
    "comma ends": b'[{"a": 1}, ]',
    "after the end": b'[{"a": 1}] x',
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(message: str, tmp_path: Path) -> None:
    (tmp_path / "file.parquet").write_bytes(REFUSED[message])
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "file.parquet")
    assert "file.parquet" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "stream.arrow",
        "file.arrow",
        "file_zstd.arrow",
        "groups.parquet",
        "list.json",
        "lines.jsonl.gz",
        "lines.jsonl.zst",
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_files_are_errors(name: str, share: float, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"damaged|truncated"):
        read(tmp_path / name)


def test_stream_cut_between_batches_is_an_error(tmp_path: Path) -> None:
    """pyarrow alone reads such a file without complaint and loses the rest."""
    write_ipc(tmp_path / "s.arrow", stream=True)
    data = (tmp_path / "s.arrow").read_bytes()
    (tmp_path / "s.arrow").write_bytes(data[:-8])
    with pytest.raises(DataError, match="end marker is missing"):
        read(tmp_path / "s.arrow")


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "FREE_EXPANSION_BYTES", 1 << 20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1_000_000))
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 600, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"a": column}), tmp_path / "bomb.parquet", store_schema=False)
    batch = pa.record_batch([pa.array(["x" * 10_000_000])], ["a"])
    with pa.ipc.new_file(
        tmp_path / "bomb.arrow", batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_batch(batch)
    before = pa.default_memory_pool().max_memory()
    for name in ("bomb.jsonl.gz", "bomb.parquet", "bomb.arrow"):
        with pytest.raises(DataError, match="grows more than 200 times"):
            read(tmp_path / name)
    assert pa.default_memory_pool().max_memory() - before < 40 << 20, "60 MB of rows were never built"


def test_manifests_of_folders_cannot_reach_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"x")
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("../secret.arrow", "/etc/passwd", "..", "a/b", "", 3):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match="not a plain name"):
            read(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(DataError, match="missing"):
        read(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{}], "_indices_data_files": [1]}))
    with pytest.raises(DataError, match="flatten_indices"):
        read(folder)


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    for path, message in (("nothing", "does not exist"), ("*.jsonl", "no file matches"), (".", "holds no data files")):
        with pytest.raises(DataError, match=message):
            read(tmp_path / path)
