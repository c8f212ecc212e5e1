"""Conversion: nothing lost, same bytes every time, whatever interrupts it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_tools import convert as convert_module
from data_tools.answers import without_tags
from data_tools.chat import ChatTokenizer
from data_tools.convert import ConvertOptions, convert_rows
from data_tools.encode import EncodeOptions
from data_tools.errors import DataError
from megatron_rest.data.prompt_files import PROMPT_SCHEMA, map_shard
from megatron_rest.rewards import tool_call_reward
from megatron_rest.token_region import TokenRegion
from tests.data_tools.conftest import SAMPLES

Rows = list[dict[str, Any]]


def options(inputs: list[Path], output: Path, tokenizer: Path, **changes: Any) -> ConvertOptions:
    encode = EncodeOptions(**{k: changes.pop(k) for k in ("prompt_style", "max_think_words") if k in changes})
    defaults: dict[str, Any] = {"processes": 1, "progress_bar": False}
    return ConvertOptions(
        inputs=[str(path) for path in inputs], output=output, tokenizer=tokenizer, encode=encode, **(defaults | changes)
    )


def rows_of(output: Path) -> Rows:
    manifest = json.loads((output / "manifest.json").read_text())
    return [row for entry in manifest["outputs"] for batch in map_shard(output, entry) for row in batch.to_pylist()]


def regions_of(row: dict[str, Any]) -> dict[TokenRegion, list[str]]:
    """The stored runs of answer_text by region."""
    text, runs = row["answer_text"].encode(), {region: [] for region in TokenRegion}
    for region, (start, end) in zip(row["answer_region_ids"], pairwise([0, *row["answer_region_ends"]]), strict=True):
        runs[TokenRegion(region)].append(text[start:end].decode())
    assert sum(len(piece.encode()) for pieces in runs.values() for piece in pieces) == len(text)
    return runs


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def mixed(tmp_path: Path, sft_rows: Rows) -> Path:
    """Three good rows and four bad ones."""
    lines = [json.dumps(row) for row in sft_rows[:3]]
    bad = ["{", "null", json.dumps({"a": 1}), json.dumps({**sft_rows[0], "output": "no tags"})]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([lines[0], *bad, *lines[1:]]))
    return path


def reference_of(source: dict[str, Any]) -> str:
    """The row's reference; a thought that mentions tags mentions their names only, since it would not earn its own
    reward as it came."""
    thought, closing, rest = source["output"].partition("</think>")
    if any(tag in thought for tag in ("<tool_call>", "<response>")):
        thought = "<think>" + without_tags(thought.removeprefix("<think>"))
    return thought + closing + rest


def test_columns_hold_what_they_promise(tokenizer: ChatTokenizer, tmp_path: Path, sft_rows: Rows) -> None:
    manifest = convert_rows(options([SAMPLES / "rlla_sft.json"], tmp_path / "out", tokenizer.folder))
    rows = rows_of(tmp_path / "out")
    assert len(rows) == len(sft_rows) == 229
    assert manifest["counts"]["references_rewritten"] == 11
    assert sum(reference_of(source) != source["output"] for source in sft_rows) == 11
    for number, (row, source) in enumerate(zip(rows, sft_rows, strict=True)):
        reference = reference_of(source)
        assert (row["source_file"], row["source_row"]) == ("rlla_sft.json", number)
        assert row["ground_truth"] == row["answer_text"] == reference
        reward = tool_call_reward(row["answer_text"], row["ground_truth"], step=1)
        assert reward.is_format_valid and reward.accuracy == 1.0
        prompt = tokenizer.decode(row["prompt_token_ids"])
        assert prompt == (
            f"<|im_start|>system\n{source['instruction']}<|im_end|>\n<|im_start|>user\n{source['input']}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert tokenizer.decode(row["answer_token_ids"]) == reference + "<|im_end|>"
        starts, text = row["answer_token_starts"], reference.encode()
        for index in (0, 5, len(starts) // 2, len(starts) - 2):
            piece = text[starts[index] : starts[index + 1]]
            assert tokenizer.decode([row["answer_token_ids"][index]]) == piece.decode(errors="replace")
        body = reference.split("</think>")[-1]
        calls = [json.loads(x) for x in body.splitlines() if x.startswith("{")]
        assert json.loads(row["calls"]) == calls
        runs = regions_of(row)
        assert [json.loads(f'"{run}"') for run in runs[TokenRegion.TOOL_NAME]] == [call["name"] for call in calls]
        assert [json.loads(run) for run in runs[TokenRegion.TOOL_ARGS]] == [call["parameters"] for call in calls]
        assert runs[TokenRegion.THINK] == [reference.split("</think>")[0].removeprefix("<think>")]
        assert runs[TokenRegion.RESPONSE] == re.findall(r"<response>(.*?)</response>", body, re.DOTALL)
        assert len(json.loads(row["tools"])) == source["instruction"].count("\nDescription: ")
    assert len({row["prompt_id"] for row in rows}) == 229


def test_file_maps_without_a_copy(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    manifest = convert_rows(options([SAMPLES / "rlla_sft.json"], tmp_path / "out", tokenizer.folder))
    before = pa.total_allocated_bytes()
    (batch,) = map_shard(tmp_path / "out", manifest["outputs"][0])
    assert pa.total_allocated_bytes() - before < 1 << 16
    assert batch.schema.equals(PROMPT_SCHEMA)
    assert batch.schema.metadata[b"megatron_rest.schema_version"] == b"3"
    assert batch.schema.metadata[b"megatron_rest.tokenizer"].decode() == tokenizer.identity


def test_bad_rows_are_quarantined_and_counts_add_up(tokenizer_folder: Path, mixed: Path, tmp_path: Path) -> None:
    manifest = convert_rows(options([mixed], tmp_path / "out", tokenizer_folder))
    counts = manifest["counts"]
    assert (counts["rows_in"], counts["rows_out"], counts["rows_quarantined"]) == (7, 3, 4)
    assert sum(counts["quarantine_reasons"].values()) == 4
    refused = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in refused] == [1, 2, 3, 4]
    assert refused[2]["content"] == {"a": 1}
    assert "neither <tool_call> nor <response>" in refused[3]["reason"]
    assert [row["source_row"] for row in rows_of(tmp_path / "out")] == [0, 5, 6]


def test_nulls_clashing_types_and_unknown_columns_cost_their_rows_only(
    tokenizer_folder: Path, tmp_path: Path, sft_rows: Rows
) -> None:
    import pyarrow.parquet as pq

    good = {
        "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "<response> r </response>"}]
    }
    nulls = [
        good,
        {"messages": None},
        {"messages": [None, good["messages"][1]]},
        {"messages": [{"role": None, "content": "u"}, good["messages"][1]]},
        {"messages": [{"role": "user", "content": None}, good["messages"][1]]},
        {"messages": [good["messages"][0], {"role": "assistant", "content": None}]},
        good,
    ]
    pq.write_table(pa.Table.from_pylist(nulls), tmp_path / "a.parquet")
    clashes: Rows = [
        {**sft_rows[0], "extra": 1},
        {**sft_rows[1], "extra": {"deep": ["x"]}},  # pyarrow.json refuses such a file
        {**sft_rows[2], "output": {"think": "t"}},
        {**sft_rows[3], "input": 5},
        {**sft_rows[4], "tools": {"x": 5}},
        {"frage": "?", "antwort": "!"},
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clashes))
    inputs = [tmp_path / "a.parquet", tmp_path / "b.jsonl"]
    counts = convert_rows(options(inputs, tmp_path / "out", tokenizer_folder))["counts"]
    assert (counts["rows_in"], counts["rows_out"], counts["rows_quarantined"]) == (13, 4, 9)
    assert [(row["source_file"], row["source_row"]) for row in rows_of(tmp_path / "out")] == [
        *(("a.parquet", row) for row in (0, 6)),
        *(("b.jsonl", row) for row in (0, 1)),
    ]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    expected = [
        "the conversation is NoneType",
        "a message is NoneType ('None')",
        "role 'None'",
        "a user message is empty",
        "neither tool calls nor a response",
        "output is dict, expected text",
        "content of a user message is int",
        "tools are one object without a name",
        "no known layout has the columns antwort, frage: name them with --column",
    ]
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason


def test_strict_stops_at_the_first_bad_row(tokenizer_folder: Path, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--strict: mixed\.jsonl line 2 \(row 1\): the line is not JSON"):
        convert_rows(options([mixed], tmp_path / "out", tokenizer_folder, strict=True))
    assert not (tmp_path / "out").exists()


def test_nothing_usable_is_an_error(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 3)
    with pytest.raises(DataError, match=r"none of 3 rows is usable.*no known layout"):
        convert_rows(options([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer_folder))
    assert not (tmp_path / "out").exists()


def test_existing_output_is_replaced_only_on_request(tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_rows(options([SAMPLES / "test.parquet"], out, tokenizer_folder))
    before = digest(out)
    with pytest.raises(DataError, match="--overwrite"):
        convert_rows(options([SAMPLES / "rlla_sft.json"], out, tokenizer_folder))
    assert digest(out) == before
    convert_rows(options([SAMPLES / "rlla_sft.json"], out, tokenizer_folder, overwrite=True))
    assert len(rows_of(out)) == 229
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left behind"


def test_toy_options_change_what_is_imitated_but_not_the_truth(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    plain = options([SAMPLES / "rlla_sft.json"], tmp_path / "plain", tokenizer.folder)
    toy = options(
        [SAMPLES / "rlla_sft.json"], tmp_path / "toy", tokenizer.folder, prompt_style="compact", max_think_words=5
    )
    convert_rows(plain)
    manifest = convert_rows(toy)
    assert any("compact" in note for note in manifest["notes"])
    assert any("5 words" in note for note in manifest["notes"])
    for before, after in zip(rows_of(plain.output), rows_of(toy.output), strict=True):
        assert len(after["prompt_token_ids"]) < len(before["prompt_token_ids"]) - 300
        assert len(after["answer_text"].split("</think>")[0].split()) <= 6
        for same in ("prompt_id", "ground_truth", "tools", "calls"):
            assert before[same] == after[same]


def many_rows(path: Path, sft_rows: Rows, count: int) -> Path:
    with path.open("w") as file:
        for number in range(count):
            row = dict(sft_rows[number % len(sft_rows)], n=number)
            if number % 97 == 0:
                row["output"] = "broken"
            file.write(json.dumps(row) + "\n")
    return path


def die(chunk: Any) -> None:
    os._exit(3)


def say_ready() -> None:
    Path(os.environ["WORKER_IS_READY"]).touch()


@pytest.fixture
def parent_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A pool for few chunks, a parent slow enough for it to take part; yields the first rows the parent encoded."""
    ready, encode, encoded = tmp_path / "ready", convert_module.encode_chunk, list[int]()

    def wait_and_encode(chunk: Any, *rest: Any) -> Any:
        deadline = time.monotonic() + 120
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        encoded.append(chunk.first_row)
        return encode(chunk, *rest)

    monkeypatch.setenv("WORKER_IS_READY", str(ready))
    monkeypatch.setattr(convert_module, "FEWEST_CHUNKS_FOR_A_POOL", 2)
    monkeypatch.setattr(convert_module, "_say_ready", say_ready)
    monkeypatch.setattr(convert_module, "encode_chunk", wait_and_encode)
    return encoded


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the rows: hundreds of them are as many chunks as thousands would be."""
    monkeypatch.setattr("data_tools.readers.json_text.CHUNK_ROWS", 64)


@pytest.mark.usefixtures("small_chunks")
def test_a_worker_that_dies_is_an_error_not_a_hang(
    tokenizer_folder: Path,
    sft_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parent_chunks: list[int],
) -> None:
    path = many_rows(tmp_path / "rows.jsonl", sft_rows, 630)
    monkeypatch.setattr(convert_module, "_work", die)
    with pytest.raises(DataError, match="a worker process died"):
        convert_rows(options([path], tmp_path / "out", tokenizer_folder, processes=2))


@pytest.mark.usefixtures("small_chunks")
def test_bytes_depend_on_the_input_alone(
    tokenizer_folder: Path, sft_rows: Rows, tmp_path: Path, parent_chunks: list[int]
) -> None:
    path = many_rows(tmp_path / "rows.jsonl", sft_rows, 630)
    one = options([path], tmp_path / "one", tokenizer_folder, rows_per_shard=112)
    two = options([path], tmp_path / "two", tokenizer_folder, rows_per_shard=112, processes=2)
    convert_rows(two)
    by_parent = len(parent_chunks)
    assert 1 <= by_parent < 10, "parent and worker share the ten chunks"
    manifest = convert_rows(one)
    assert len(parent_chunks) == by_parent + 10
    assert digest(one.output) == digest(two.output)
    assert len(manifest["outputs"]) == 5  # a shard ends with the chunk that fills it
    assert manifest["counts"]["rows_quarantined"] == len(range(0, 630, 97))
    numbers = [row["source_row"] for row in rows_of(one.output)]
    assert numbers == [n for n in range(630) if n % 97]


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_conversion_goes_on(
    tokenizer_folder: Path, sft_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many_rows(tmp_path / "rows.jsonl", sft_rows, 375)
    whole = options([path], tmp_path / "whole", tokenizer_folder, rows_per_shard=75)
    cut = options([path], tmp_path / "cut", tokenizer_folder, rows_per_shard=75)
    convert_rows(whole)
    encode, calls = convert_module.encode_chunk, 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(convert_module, "encode_chunk", failing)
    with pytest.raises(KeyboardInterrupt):
        convert_rows(cut)
    assert not cut.output.exists()
    calls = 10
    convert_rows(cut)
    assert calls - 10 == 6 - 2, "the two chunks of the finished shard are not encoded again"
    assert digest(cut.output) == digest(whole.output)


def test_progress_with_other_chunks_is_refused(
    tokenizer_folder: Path, sft_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many_rows(tmp_path / "rows.jsonl", sft_rows, 1500)
    cut = options([path], tmp_path / "out", tokenizer_folder, rows_per_shard=500)
    encode = convert_module.encode_chunk
    monkeypatch.setattr(
        convert_module, "encode_chunk", lambda chunk, *rest: 1 / 0 if chunk.first_row > 600 else encode(chunk, *rest)
    )
    with pytest.raises(ZeroDivisionError):
        convert_rows(cut)
    monkeypatch.undo()
    monkeypatch.setattr("data_tools.readers.json_text.CHUNK_ROWS", 100)
    with pytest.raises(DataError, match="another version that cut the rows differently"):
        convert_rows(cut)
    assert not cut.output.exists()


def test_progress_of_other_inputs_is_not_taken(
    tokenizer_folder: Path, sft_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many_rows(tmp_path / "rows.jsonl", sft_rows, 1500)
    cut = options([path], tmp_path / "out", tokenizer_folder, rows_per_shard=500)
    encode = convert_module.encode_chunk
    monkeypatch.setattr(
        convert_module, "encode_chunk", lambda chunk, *rest: 1 / 0 if chunk.first_row > 600 else encode(chunk, *rest)
    )
    with pytest.raises(ZeroDivisionError):
        convert_rows(cut)
    monkeypatch.undo()
    many_rows(path, sft_rows[5:], 1500)
    convert_rows(cut)
    assert rows_of(cut.output)[0]["ground_truth"] == reference_of(sft_rows[6])


def test_two_conversions_do_not_share_an_output(tokenizer_folder: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial" / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another conversion is writing"):
            convert_rows(options([SAMPLES / "test.parquet"], tmp_path / "out", tokenizer_folder))


def kill_and_rerun(command: list[str], output: Path, *, points: int, seconds: float, seed: int) -> int:
    """SIGKILL the command at random moments; a visible output must always be whole.  Returns how many kills hit."""
    chance, hits = random.Random(seed), 0
    for _ in range(points):
        process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(chance.uniform(0.2, seconds))
        hits += process.poll() is None
        with contextlib.suppress(ProcessLookupError):  # it had ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if output.exists():
            return hits
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return hits


@pytest.mark.extended
def test_killed_and_run_again_gives_the_same_bytes(tokenizer_folder: Path, sft_rows: Rows, tmp_path: Path) -> None:
    path = many_rows(tmp_path / "rows.jsonl", sft_rows, 3000)
    whole = options([path], tmp_path / "whole", tokenizer_folder, rows_per_shard=512)
    start = time.monotonic()
    convert_rows(whole)
    seconds = time.monotonic() - start + 1.0
    command = [sys.executable, "-m", "data_tools", "convert", "--input", str(path), "--output", str(tmp_path / "cut")]
    command += ["--tokenizer", str(tokenizer_folder), "--rows-per-shard", "512", "--processes", "1"]
    assert kill_and_rerun(command, tmp_path / "cut", points=4, seconds=seconds, seed=7) >= 1
    assert digest(tmp_path / "cut") == digest(whole.output)
    assert not (tmp_path / "cut.partial").exists()
