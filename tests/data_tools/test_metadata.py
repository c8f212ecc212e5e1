"""What a row brings besides prompt and reference reaches the prepared file, and a run's prompts."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_tools.columns import Columns
from data_tools.examples import Reading, normalise
from data_tools.metadata import MAX_CHARACTERS
from megatron_rest.data.prompt_files import _WITHOUT_METADATA, MANIFEST_NAME, map_shard
from megatron_rest.data.prompts import PromptDataset

TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = {"name": "f", "arguments": {"a": 1}}
ASKED = [{"role": "user", "content": "do it"}]
ANSWER = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (
            {"prompt": ASKED, "reward_model": {"style": "rule", "ground_truth": [CALL]}, "data_source": "mine",
             "extra_info": {"index": 7, "split": "train"}, "tools": [TOOL]},
            {"reward_model": {"style": "rule"}, "data_source": "mine", "extra_info": {"index": 7, "split": "train"}},
        ),
        (
            {"prompt": ASKED, "label": [CALL], "metadata": json.dumps({"tools": [TOOL], "level": 2})},
            {"metadata": {"level": 2}},
        ),
        ({"messages": [*ASKED, ANSWER], "tools": [TOOL], "id": 3, "nothing": None}, {"id": 3}),
        (
            {"responses_create_params": {"input": ASKED, "tools": [TOOL]}, "expected_action": CALL,
             "verifier_type": "x"},
            {"verifier_type": "x"},
        ),
        ({"query": "do it", "answers": [CALL], "tools": [TOOL]}, {}),
    ],
    ids=["verl", "slime", "openai", "nemo-gym", "xlam"],
)  # fmt: skip
def test_columns_that_nothing_is_read_from_are_kept(row: dict[str, Any], kept: dict[str, Any]) -> None:
    example = normalise(row)
    assert json.loads(example.metadata_json) == kept and example.notes == normalise({**row}).notes


def test_a_mapping_keeps_what_it_does_not_name() -> None:
    columns = Columns.from_pairs({"user": "ask", "calls": "meta.gold", "tools": "meta.api"})
    row = {"ask": "do it", "meta": {"gold": [CALL], "api": [TOOL], "from": "here"}, "difficulty": 0.5}
    example = normalise(row, Reading(columns=columns))
    assert json.loads(example.metadata_json) == {"meta": {"from": "here"}, "difficulty": 0.5}


def test_what_json_has_no_word_for() -> None:
    row = {"query": "do it", "answers": [CALL], "tools": [TOOL], "when": datetime.date(2026, 1, 2), "bad": math.nan}
    example = normalise({**row, "half": "\ud800x", "raw": b"picture"})
    assert json.loads(example.metadata_json) == {"when": "2026-01-02", "bad": None, "half": "?x"}
    assert any("left out of the metadata" in note for note in example.notes)
    long = normalise({**row, "text": "x" * MAX_CHARACTERS})
    assert long.metadata_json == "{}" and any("metadata of more than" in note for note in long.notes)


def test_it_reaches_the_prompts_of_a_run(tmp_path: Path, tokenizer_folder: Path) -> None:
    from data_tools.cli import main

    rows = [{"query": f"do {i}", "answers": [CALL], "tools": [TOOL], "level": i} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert = ["convert", "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*convert, "--tokenizer", str(tokenizer_folder), "--processes", "1"]) == 0
    prompts = PromptDataset.open(tmp_path / "out")
    assert [prompts[i].metadata for i in range(3)] == [{"level": i} for i in range(3)]
    assert prompts[0].tools == [TOOL] and prompts[0].messages[-1]["content"] == "do 0"
    assert main(["validate", str(tmp_path / "out")]) == 0

    # A folder of the version before, which had no such column.
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    [entry] = manifest["outputs"]
    [batch] = map_shard(tmp_path / "out", entry)
    old = tmp_path / "old"
    old.mkdir()
    with pa.ipc.new_file(str(old / entry["name"]), _WITHOUT_METADATA) as writer:
        writer.write_batch(batch.drop_columns(["metadata"]))
    entry["bytes"] = (old / entry["name"]).stat().st_size
    (old / MANIFEST_NAME).write_text(json.dumps({**manifest, "schema_version": 2}))
    assert PromptDataset.open(old)[1].metadata == {} and PromptDataset.open(old)[1].tools == [TOOL]
