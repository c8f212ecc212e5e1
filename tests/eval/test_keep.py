"""The small files of a judged run: everything that the tables read, nothing else, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_rest.eval.keep import keep, main
from tests.analysis.runs import make_run


def judged(folder: Path) -> Path:
    run_dir = make_run(folder, 4)
    (run_dir / "config.yaml").write_text("trainer: {steps: 4}\n")
    row = {"prompt_id": "a", "prompt": "long", "answer": ["x"], "first_answer_regions": [["x", 1]], "reward": [1.0]}
    stored = {"settings": {"weights_sha256": "abc"}, "sets": {"heldout": [row]}}
    (run_dir / "prompt_sets.json").write_text(json.dumps(stored))
    (run_dir / "hf").mkdir(exist_ok=True)
    (run_dir / "hf" / "model.safetensors").write_bytes(b"weights")
    return run_dir


def test_scores_stay_and_texts_and_weights_do_not(tmp_path: Path) -> None:
    run_dir, kept = judged(tmp_path / "run"), tmp_path / "kept" / "grpo" / "seed-1"
    assert main([str(run_dir), str(kept)]) == 0
    names = {p.name for p in kept.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "prompt_sets.json", "kept.json"}
    [row] = json.loads((kept / "prompt_sets.json").read_text())["sets"]["heldout"]
    assert row == {"prompt_id": "a", "reward": [1.0]}
    said = json.loads((kept / "kept.json").read_text())
    assert said["weights_sha256"] == "abc"
    assert said["files"] == {n: hashlib.sha256((kept / n).read_bytes()).hexdigest() for n in names - {"kept.json"}}
    assert (kept / "metrics.jsonl").read_bytes() == (run_dir / "metrics.jsonl").read_bytes()
    assert sorted(p.name for p in kept.parent.iterdir()) == ["seed-1"], "nothing half-written is left"


def test_the_path_of_the_checkout_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = judged(tmp_path / "run")
    (run_dir / "config.yaml").write_text(f"trainer: {{run_dir: {run_dir}}}\nmodel: {{path: /elsewhere/model}}\n")
    keep(run_dir, tmp_path / "kept")
    assert (tmp_path / "kept" / "config.yaml").read_text() == (
        "trainer: {run_dir: run}\nmodel: {path: /elsewhere/model}\n"
    )


def test_what_was_measured_besides_is_kept(tmp_path: Path) -> None:
    run_dir = judged(tmp_path / "run")
    for name in ("benchmarks.json", "variance.json"):
        (run_dir / name).write_text(f'{{"of": "{name}"}}')
    keep(run_dir, tmp_path / "kept")
    said = json.loads((tmp_path / "kept" / "kept.json").read_text())
    for name in ("benchmarks.json", "variance.json"):
        assert json.loads((tmp_path / "kept" / name).read_text()) == {"of": name} and name in said["files"]


def test_a_run_that_was_not_judged_and_a_folder_that_is_there_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(make_run(tmp_path / "run", 2)), str(tmp_path / "kept")]) == 2
    assert "prompt_sets.json" in capsys.readouterr().err and not (tmp_path / "kept").exists()
    run_dir = judged(tmp_path / "judged")
    keep(run_dir, tmp_path / "kept")
    with pytest.raises(FileExistsError, match="take it away"):
        keep(run_dir, tmp_path / "kept")


def test_of_a_run_whose_training_alone_counts_no_scores_are_asked(tmp_path: Path) -> None:
    run_dir, kept = make_run(tmp_path / "run", 3), tmp_path / "kept" / "tuning" / "grpo-2e-05"
    assert main([str(run_dir), str(kept), "--unjudged"]) == 0
    assert (kept / "metrics.jsonl").is_file() and not (kept / "prompt_sets.json").exists()
    assert "weights_sha256" not in json.loads((kept / "kept.json").read_text())


def test_checkpoints_go_once_the_small_files_are_safe_and_not_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", 4)
    for name in ("checkpoints/step_000004", "hf_step_000002", "hf"):
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / "weights").write_bytes(b"x" * 1000)
    words = [str(run_dir), str(tmp_path / "kept"), "--remove-checkpoints"]
    assert main(words) == 2, "it was not judged"
    assert (run_dir / "checkpoints" / "step_000004" / "weights").is_file()
    assert main([*words, "--unjudged"]) == 0
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "hf_step_000002").exists()
    assert (run_dir / "hf" / "weights").is_file() and (run_dir / "metrics.jsonl").is_file()
    assert "checkpoints taken away" in capsys.readouterr().out
