"""A run that is killed continues as if it had not been; whatever happens to it, it ends as the run that was left alone.

1. resume-check, the real command on the real thing, in the hardest mode: equal, and everything was compared
2. what it compares with can fail: every part of a checkpoint, metrics and exported weights, each changed by one bit
3. the same checkpoint at PP 2 instead of TP 2: everything comes along, the rollouts in the queue to the bit
4. a few random faults (`make chaos` has 30): engines killed, a rank killed, a damaged checkpoint
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import chaos
from megatron_rest.commands import resume_check, run_diff
from megatron_rest.commands.run_diff import compare_checkpoints, compare_runs, difference
from megatron_rest.commands.tiny import make_base
from megatron_rest.data.rollout_file import read_rollouts, rollout_path

PARTS = ["counters", "curriculum", "data order", "exported weights", "metrics", "model", "optimizer", "random streams",
         "rollout queue", "rollouts", "schedule"]  # fmt: skip


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> tuple[Path, int, str]:
    """Folder with both runs, exit status, and what the command printed."""
    folder = tmp_path_factory.mktemp("resume") / "kept"
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(resume_check.Console, "line", lambda self, text="": said.append(text))
        status = resume_check.main(["--half", "1", "--keep", str(folder)])
    return folder, status, "\n".join(said)


@pytest.mark.extended
def test_a_killed_run_continues_byte_by_byte(checked):
    folder, status, said = checked
    assert status == 0, said
    assert said.endswith("equal, byte by byte")
    lines = [line.split() for line in said.splitlines() if line.startswith("  ")]
    assert [" ".join(words[:-3]) for words in lines] == PARTS
    assert all(words[-1] == "equal" and int(words[-3]) > 0 for words in lines)
    starts = [json.loads(line) for line in (folder / "killed" / "starts.jsonl").read_text().splitlines()]
    assert [start["after_step"] for start in starts] == [0, 1]


@pytest.mark.extended
def test_the_checkpoint_holds_the_rollouts_of_the_next_step(checked):
    """One step off they are sampled while the step before trains, by weights that no engine will hold again."""
    values = run_diff.checkpoint_values(checked[0] / "killed" / "checkpoints" / "step_000001")
    assert values["rollout queue", "queue.rollouts_by_token"].numel() > 24
    assert len([name for part, name in values if part == "data order"]) == 6
    states = {name: v for (part, name), v in values.items() if part == "random streams" and "model-parallel" in name}
    assert len(states) == 2 and not torch.equal(*states.values()), "one a rank, and TP ranks differ"


@pytest.mark.extended
def test_another_layout_takes_everything_along(checked, tmp_path):
    """From step 1, TP 2, to step 2 at PP 2, in a run of its own (checkpoint.load)."""
    folder, _, _ = checked
    source, run_dir = folder / "killed", tmp_path / "pp2"
    layout = ("parallel.tensor_parallel=1", "parallel.pipeline_parallel=2", "trainer.steps=2")
    load = f"checkpoint.load={source / 'checkpoints' / 'step_000001'}"
    status, output = chaos.start(folder, run_dir, *resume_check.HARDEST, *layout, load)
    assert status == 0, output
    assert "WARNING: saved at another layout: random streams begin anew from trainer.seed" in output
    [ours], theirs = chaos.metrics_of(run_dir), chaos.metrics_of(source)[1]
    ours_saved, theirs_saved = (read_rollouts(rollout_path(run, 2)) for run in (run_dir, source))
    for name in ("token_ids", "rollout_log_probs", "rewards", "region_ids"):
        assert getattr(ours_saved, name).tobytes() == getattr(theirs_saved, name).tobytes(), f"{name}: from the queue"
    np.testing.assert_allclose(ours_saved.token_weights, theirs_saved.token_weights, rtol=1e-5)
    for name, value in theirs.items():
        if not name.startswith(
            ("sync/", "mismatch/", "loss/kl", "pack/")
        ):  # rounding itself, or what the layout decides
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.extended
def test_checkpoints_of_two_steps_differ_in_every_part_that_moves(checked):
    first, second = (checked[0] / "killed" / "checkpoints" / f"step_{step:06d}" for step in (1, 2))
    diff = compare_checkpoints(first, second)
    assert {d.part for d in diff.differences} >= set(PARTS) - {
        "exported weights",
        "metrics",
        "rollouts",
        "random streams",
    }


@pytest.mark.extended
def test_one_bit_is_found_and_named(checked, tmp_path):
    ours, theirs = checked[0] / "killed", tmp_path / "theirs"
    shutil.copytree(ours, theirs)
    weights = load_file(theirs / "hf" / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(torch.int32).view(-1)[3] ^= 1
    save_file(weights, theirs / "hf" / "model.safetensors")
    rows = (theirs / "metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[1])
    row["metrics"]["reward/total"] += 1e-9
    (theirs / "metrics.jsonl").write_text("\n".join([rows[0], json.dumps(row), rows[0]]) + "\n")
    (theirs / "rollouts" / "step_000001.npz").unlink()
    found = {(d.part, d.name): d.what for d in compare_runs(ours, theirs, step=2).differences}
    assert found["exported weights", name].startswith("1 of ")
    assert "reward/total of step 2" in {name for part, name in found if part == "metrics"}
    assert found["metrics", "reward/total of step 1 (line 2 of this step)"] == "only in the second run"
    assert found["rollouts", "token_ids of step 1"] == "only in the first run"
    assert {part for part, _ in found} == {"exported weights", "metrics", "rollouts"}


def test_values_are_compared_by_their_bits():
    assert difference(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("nan")])) == ""
    assert difference(torch.tensor([0.0]), torch.tensor([-0.0])) == "1 of 1 values, by 0 at most"
    assert difference(torch.zeros(2), torch.zeros(2, dtype=torch.float64)).startswith("torch.float32 [2] and")
    assert difference(float("nan"), float("nan")) == "" and difference(1, 1.0) == "1 and 1.0"


def test_a_configuration_is_named_that_does_not_fit(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("trainer: {steps: 4}\n")
    assert resume_check.main(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "how many ranks it ran on: say --ranks" in capsys.readouterr().err


@pytest.mark.extended
def test_a_disturbed_run_ends_as_one_that_was_left_alone(tmp_path):
    """An engine out of memory, launcher and rank killed, a file lost, half a line of metrics; guests that fail."""
    base = make_base(tmp_path)
    settings = ("trainer.steps=4", *chaos.GUESTS)
    chaos.train(base, base / "calm", *settings)
    happened = chaos.disturb(base, base / "disturbed", *settings, faults=5, seed=21, quiet=True)
    assert happened.wrong == []
    assert happened.num_faults == 5
    assert chaos.differences(base / "calm", base / "disturbed", steps=4) == []
