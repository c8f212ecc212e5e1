"""The reader: zero-copy, refuses what it must, and an order that is a pure function of (seed, epoch)."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.convert import ConvertOptions, convert_rows
from data_tools.train_tokenizer import texts_of, train_and_save
from megatron_rest.data.prompts import PromptDataset, prompts_for_step

SAMPLES = Path(__file__).parents[2] / "data_tools" / "samples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(tokenizer, prepared data in three shards)"""
    root = tmp_path_factory.mktemp("prompts")
    train_and_save(texts_of([str(SAMPLES / "test.parquet")]), vocab_size=500, output=root / "tok")
    lines = root / "rows.jsonl"
    rows = json.loads((SAMPLES / "rlla_sft.json").read_text())
    lines.write_text(
        "".join(json.dumps({**row, "input": f"{row['input']} {n}"}) + "\n" for n in range(6) for row in rows)
    )
    convert_rows(
        ConvertOptions(
            inputs=[str(lines)],
            output=root / "data",
            tokenizer=root / "tok",
            rows_per_shard=512,
            processes=1,
            progress_bar=False,
        )
    )
    return root / "tok", root / "data"


def test_samples_are_the_rows_of_the_files(folders: tuple[Path, Path]) -> None:
    dataset = PromptDataset.open(folders[1], tokenizer_path=str(folders[0]))
    assert len(dataset) == 6 * 229
    for index in (0, 511, 512, 1023, 1024, 1373):
        sample, record = dataset[index], dataset.record(index)
        assert sample.index == record["source_row"] == index
        assert sample.prompt_id == record["prompt_id"]
        assert sample.ground_truth == record["ground_truth"]
        assert sample.token_ids.dtype == dataset.reference_token_ids(index).dtype == np.int32
        assert sample.token_ids.tolist() == record["prompt_token_ids"]
        assert dataset.reference_token_ids(index).tolist() == record["answer_token_ids"]
        assert dataset.prompt_lengths[index] == len(sample.token_ids)
    for index in (-1, 1374):
        with pytest.raises(IndexError):
            dataset[index]


def test_opening_copies_nothing(folders: tuple[Path, Path]) -> None:
    before = pa.total_allocated_bytes()
    dataset = PromptDataset.open(folders[1])
    ids = dataset[700].token_ids
    assert pa.total_allocated_bytes() - before < 1 << 16
    assert not ids.flags.owndata
    assert not ids.flags.writeable


def test_select_leaves_out_and_counts_but_never_cuts(folders: tuple[Path, Path]) -> None:
    dataset = PromptDataset.open(folders[1])
    limit = int(np.median(dataset.prompt_lengths))
    chosen = dataset.select(max_prompt_tokens=limit)
    assert chosen.num_left_out == int((dataset.prompt_lengths > limit).sum()) > 0
    assert len(chosen) + chosen.num_left_out == len(dataset)
    assert chosen.prompt_lengths.max() <= limit
    assert [chosen[i].index for i in range(len(chosen))] == np.flatnonzero(dataset.prompt_lengths <= limit).tolist()
    few = chosen.select(max_prompt_tokens=limit, max_prompts=10)
    assert len(few) == 10
    assert few.num_left_out == chosen.num_left_out
    assert few[9].prompt_id == chosen[9].prompt_id
    short = dataset.select(max_prompt_tokens=limit, max_answer_tokens=400)
    fits = (dataset.prompt_lengths <= limit) & (dataset.answer_lengths <= 400)
    assert len(short) == fits.sum() > 0
    assert short.num_left_out == (~fits).sum()
    with pytest.raises(ValueError, match="no fitting prompt has an answer of at most 1 tokens"):
        dataset.select(max_prompt_tokens=limit, max_answer_tokens=1)
    with pytest.raises(ValueError, match=r"longer than max_prompt_tokens=3 \(the shortest has"):
        dataset.select(max_prompt_tokens=3)


def test_another_tokenizer_or_template_is_refused_by_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train_and_save(texts_of([str(SAMPLES / "test.parquet")]), vocab_size=400, output=tmp_path / "other")
    with pytest.raises(ValueError, match=r"another tokenizer .* than .*other"):
        PromptDataset.open(folders[1], tokenizer_path=str(tmp_path / "other"))
    shutil.copytree(folders[0], tmp_path / "same")
    (tmp_path / "same" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match="another chat template"):
        PromptDataset.open(folders[1], tokenizer_path=str(tmp_path / "same"))
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        PromptDataset.open(folders[1], tokenizer_path=str(tmp_path))


def test_damaged_folders_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest\.json: prepare it with"):
        PromptDataset.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folders[1], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    name = manifest["outputs"][1]["name"]
    (copy / name).write_bytes((copy / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{name} is missing or does not have"):
        PromptDataset.open(copy)
    (copy / name).write_bytes(b"x" * manifest["outputs"][1]["bytes"])
    with pytest.raises(ValueError, match="is damaged"):
        PromptDataset.open(copy)
    shutil.copy(folders[1] / name, copy / name)
    flipped = PromptDataset.open(copy)
    offsets = np.frombuffer(flipped._batches[1].column("ground_truth").buffers()[1], dtype=np.int32)
    with open(copy / name, "r+b") as file:
        file.seek(file.read().rindex(offsets[3:20].tobytes()))  # answer_text, before it, has the same offsets
        file.write(np.int32(1 << 30).tobytes())
    flipped = PromptDataset.open(copy)
    with pytest.raises(ValueError, match="row 2 of a batch is damaged"):
        flipped[512 + 2]
    with pytest.raises(ValueError, match="row 3 of a batch is damaged"):
        flipped.record(512 + 3)
    for change, message in (
        ({"schema_version": 99}, "schema version 99"),
        ({"outputs": [{"name": "../x", "rows": 1, "bytes": 1}]}, "not a plain file name"),
        ({"outputs": [{}]}, "damaged"),
        ({"outputs": [{"name": "x", "rows": -1, "bytes": 1}]}, "whole numbers"),
        ({"quarantine": {"name": "../../x"}}, "not a plain file name"),
        ({"counts": 3}, "counts is not an object"),
    ):
        (copy / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            PromptDataset.open(copy)


@settings(max_examples=100, deadline=None)
@given(num=st.integers(1, 40), per_step=st.integers(1, 50), seed=st.integers(-5, 2**70), epochs=st.integers(1, 4))
def test_steps_walk_through_whole_epochs(num: int, per_step: int, seed: int, epochs: int) -> None:
    steps = -(-num * epochs // per_step)
    order = [i for step in range(1, steps + 1) for i in prompts_for_step(num, per_step, seed=seed, step=step)]
    for epoch in range(epochs):
        assert sorted(order[epoch * num : (epoch + 1) * num]) == list(range(num))


def test_order_depends_on_seed_and_epoch_only() -> None:
    small = [i for step in range(1, 13) for i in prompts_for_step(12, 3, seed=4, step=step)]
    large = [i for step in range(1, 4) for i in prompts_for_step(12, 12, seed=4, step=step)]
    assert small[:36] == large, "the batch size only cuts the order into steps"
    assert large[:12] != large[12:24], "every epoch has its own order"
    assert prompts_for_step(12, 12, seed=5, step=1) != large[:12]
    assert prompts_for_step(12, 12, seed=4, step=1) == [4, 7, 0, 6, 10, 9, 3, 11, 1, 8, 5, 2], "stable"


def test_every_data_parallel_size_sees_the_same_batch() -> None:
    rows = prompts_for_step(100, 24, seed=1, step=3)
    for dp_size in (1, 2, 3, 4, 8):
        shards = [rows[rank::dp_size] for rank in range(dp_size)]
        assert Counter(i for shard in shards for i in shard) == Counter(rows)


def test_order_is_uniform_enough() -> None:
    first = Counter(prompts_for_step(6, 1, seed=seed, step=1)[0] for seed in range(3000))
    assert all(400 < first[i] < 600 for i in range(6))


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_senseless_arguments_are_refused(arguments: tuple[int, int, int]) -> None:
    num_prompts, per_step, step = arguments
    with pytest.raises(ValueError, match="must all be at least 1"):
        prompts_for_step(num_prompts, per_step, seed=1, step=step)
