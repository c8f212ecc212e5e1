"""``compare`` over groups of runs: seeds are paired, prompts too, and what differs in the configurations is listed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_rest.analysis import compare
from megatron_rest.analysis.configuration import configuration_lines, different_settings
from megatron_rest.analysis.groups import group_lines, load_groups, paired_differences
from megatron_rest.config import OptimizerConfig, RestConfig, TrainerConfig, to_dict
from tests.analysis.runs import draw_only, make_run


def run(folder: Path, *, seed: int, slope: float, lr: float = 1e-6, scores: list[float] | None = None) -> Path:
    make_run(folder, 6, slope=slope, seed=seed)
    config = RestConfig(trainer=TrainerConfig(seed=seed, run_dir=str(folder)), optimizer=OptimizerConfig(lr=lr))
    (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "starts.jsonl").write_text(json.dumps({"code": "abc123", "world_size": 2, "host": "here"}) + "\n")
    if scores is not None:
        rows = [{"reward": [s, s], "accuracy": [s], "format_valid": [1.0]} for s in scores]
        (folder / "prompt_sets.json").write_text(json.dumps({"settings": {"seed": 1}, "sets": {"heldout": rows}}))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for seed in (1, 2, 3):
        run(tmp_path / "a" / f"seed-{seed}", seed=seed, slope=0.1, scores=[0.1 * seed, 0.2])
        run(tmp_path / "b" / f"seed-{seed}", seed=seed, slope=0.1 + 0.01 * seed, lr=1e-5, scores=[0.1 * seed, 0.5])
    run(tmp_path / "b" / "seed-9", seed=9, slope=9.0, lr=1e-5, scores=[9.0, 9.0])
    return tmp_path


def test_seeds_are_paired_and_the_rest_is_left_out(folders: Path) -> None:
    groups = load_groups([str(folders / "a"), str(folders / "b" / "seed-*")])
    text = "\n".join(group_lines(groups))
    assert "compared: seeds 1, 2, 3 (of" in text
    # reward/static is slope x step: the differences of the last three steps (4, 5, 6) are 0.05, 0.10 and 0.15.
    half = 4.3027 * 0.05 / math.sqrt(3)
    assert f"+0.100 ({0.1 - half:+.3f} to {0.1 + half:+.3f})" in text
    [row] = [line for line in text.splitlines() if line.startswith("heldout: reward (2 prompts)")]
    assert "0.200" in row and "+0.150 (+0.150 to +0.150)" in row and "(+0.000 to +0.300)" in row
    [row] = [line for line in text.splitlines() if line.startswith("optimizer.lr")]
    assert row.split() == ["optimizer.lr", "1e-06", "1e-05"] and "trainer.seed" not in text
    assert "differ among themselves" not in text


def test_the_arithmetic_of_a_pair() -> None:
    generator = np.random.default_rng(0)
    base, other = generator.normal(size=(2, 4, 5))
    seeds, prompts = paired_differences(base, other)
    assert seeds is not None and prompts is not None
    assert seeds.estimate == pytest.approx((other - base).mean()) == prompts.estimate
    assert paired_differences(base[:1, 0], other[:1, 0]) == (None, None), "one seed has no interval"


def test_what_differs_inside_a_group_is_said(folders: Path) -> None:
    run(folders / "a" / "seed-4", seed=4, slope=0.1, lr=3.0)
    groups = load_groups([str(folders / "a"), str(folders / "b")])
    assert "WARNING: the runs of A differ among themselves in optimizer.lr" in group_lines(groups)
    (folders / "a" / "seed-4" / "run.yaml").unlink()
    groups = load_groups([str(folders / "a"), str(folders / "b")])
    assert any("its settings are not known" in line for line in group_lines(groups))


def test_the_command(folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    draw_only(monkeypatch, "reward")
    assert compare.main([str(folders / "a"), str(folders / "b"), "--output", str(folders / "out")]) == 0
    shown = capsys.readouterr().out
    assert "B - A, over seeds" in shown and str(folders / "out" / "reward.png") in shown
    one, other = folders / "a" / "seed-1", folders / "b" / "seed-1"
    assert compare.main([str(one), str(other), "--output", str(folders / "out")]) == 0
    shown = capsys.readouterr().out
    assert "One seed a side is not evidence" in shown and "optimizer.lr" in shown
    for words, message in (
        ([str(one)], "two runs or groups"),
        ([str(folders), str(one)], "holds no run"),
        ([str(folders / "x*"), str(one)], "nor a pattern"),
        ([str(folders / "*" / "seed-1"), str(folders / "a" / "seed-2")], "have the seeds 1, 1: a group has each seed"),
    ):
        assert compare.main(words) == 2
        assert message in capsys.readouterr().err


def test_what_a_run_was(folders: Path) -> None:
    path = folders / "b" / "seed-2"
    lines = configuration_lines(path)
    assert lines[0].startswith("commit abc123, 2 ranks on CPU")
    assert [line.split() for line in lines if line.startswith("optimizer")] == [["optimizer.lr", "1e-05"]]
    config = RestConfig(trainer=TrainerConfig(seed=2, run_dir=str(path)))
    record = {"resolved": {"user_code": {"reward.function": {"package_digest": "123"}}}}
    for name, record_of in (("one", record), ("two", {})):
        (folders / name).mkdir()
        values = to_dict(replace(config, trainer=replace(config.trainer, run_dir=name)))
        (folders / name / "run.yaml").write_text(yaml.safe_dump(values | record_of))
    assert different_settings([folders / "one", folders / "two"]) == [("the code of reward.function", ["123", "null"])]
    assert configuration_lines(folders) == []
