"""Tables and figures of the experiment, from folders with known numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from megatron_rest.config import RestConfig, RewardConfig, to_dict
from megatron_rest.eval.experiment import main
from megatron_rest.eval.outcomes import SETS, TITLES, outcomes, pass_steps, read_experiment
from megatron_rest.eval.prompt_sets import RESULT_FILE, judge_group
from megatron_rest.rewards import tool_call_reward
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason
from tests.analysis.runs import make_run

ALGORITHMS = ("grpo", "dr_grpo", "entropy_ema")
PROMPTS = {"rl": 6, "seen": 4, "heldout": 5}


def answers(folder: Path, shift: float, *, samples: int = 2) -> None:
    """Prompt i of every set has mean reward i + shift; its two answers lie 0.5 above and below."""
    sets = {
        name: [
            {
                "prompt_id": f"{name}-{i}",
                "reward": [i + shift - 0.5, i + shift + 0.5],
                "accuracy": [0.0, 0.5 + shift / 10],
                "format_valid": [1.0, 0.0],
                "length": [9, 11],
            }
            for i in range(count)
        ]
        for name, count in PROMPTS.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"weights_sha256": f"{shift}", "samples": samples, "seed": 1}
    (folder / RESULT_FILE).write_text(json.dumps({"settings": settings, "sets": sets}))


def shift_of(algorithm: str, seed: int) -> float:
    return ALGORITHMS.index(algorithm) * (1.0 + 0.1 * seed) + seed


@pytest.fixture
def folder(tmp_path) -> Path:
    answers(tmp_path / "base" / "warm-start", -1.0)
    for name in ALGORITHMS:
        for seed in (1, 2, 3):
            run_dir = make_run(tmp_path / name / f"seed-{seed}", 8, seed=seed)
            config = RestConfig()
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, prompts_per_step=4))
            (run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
            answers(run_dir, shift_of(name, seed))
    return tmp_path


def test_means_and_differences_by_hand(folder):
    experiment = read_experiment(folder)
    assert experiment.seeds == [1, 2, 3]
    assert pass_steps(experiment) == 2, "six prompts, four a step"
    found = {(r.algorithm, r.prompts, r.measure): r for r in outcomes(experiment)}
    assert len(found) == len(ALGORITHMS) * len(SETS) * 3
    base = found["grpo", "rl", "reward"]
    assert base.start == pytest.approx(2.5 - 1)
    assert base.by_seed == pytest.approx((3.5, 4.5, 5.5)) and base.mean == pytest.approx(4.5)
    assert base.difference_over_seeds is None and base.difference_over_prompts is None
    other = found["entropy_ema", "rl", "reward"]  # 2.2, 2.4, 2.6 above GRPO at the same seed
    over_seeds, over_prompts = other.difference_over_seeds, other.difference_over_prompts
    assert over_seeds is not None and over_prompts is not None
    half = 4.3027 * 0.2 / math.sqrt(3)
    assert (over_seeds.low, over_seeds.high) == (
        pytest.approx(2.4 - half, abs=1e-4),
        pytest.approx(2.4 + half, abs=1e-4),
    )
    assert (over_prompts.low, over_prompts.high) == pytest.approx((2.4, 2.4)), "every prompt differs by as much"
    accuracy = found["dr_grpo", "heldout", "accuracy"]
    assert accuracy.by_seed == pytest.approx([0.25 + shift_of("dr_grpo", s) / 20 for s in (1, 2, 3)])


def test_report_is_written_and_drawn(folder, capsys):
    assert main([str(folder)]) == 0
    said = capsys.readouterr().out
    text = (folder / "results.md").read_text()
    assert text.strip() in said
    row = next(line for line in text.splitlines() if line.startswith("| ResT, entropy-EMA | 6"))
    assert "| 6.900 | 5.700, 6.900, 8.100 | +2.400 (+1.903 to +2.897) | +2.400 (+2.400 to +2.400) |" in row
    stored = json.loads((folder / "results.json").read_text())
    assert stored["seeds"] == [1, 2, 3] and len(stored["outcomes"]) == 27
    for name in ("training", "differences", "weights"):
        pixels = imread(folder / "plots" / f"{name}.png")[..., :3]
        assert 0.005 < (pixels < 0.9).any(axis=-1).mean() < 0.8, name


def test_only_finished_and_common_seeds_are_compared(folder):
    (folder / "grpo" / "seed-3" / "config.yaml").unlink()  # still training
    (folder / "dr_grpo" / "seed-1" / RESULT_FILE).unlink()  # not yet asked
    with pytest.raises(ValueError, match="1 seeds in common"):
        read_experiment(folder)
    shutil.rmtree(folder / "dr_grpo")
    experiment = read_experiment(folder)
    assert experiment.seeds == [1, 2] and list(experiment.policies) == ["grpo", "entropy_ema"]


def test_policies_that_were_asked_differently_are_refused(folder, capsys):
    answers(folder / "dr_grpo" / "seed-2", 1.0, samples=3)
    assert main([str(folder)]) == 2
    assert "evaluate them again" in capsys.readouterr().err
    assert not (folder / "results.md").exists()


def test_nothing_to_compare_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no finished and evaluated runs" in capsys.readouterr().err
    assert set(TITLES) >= set(ALGORITHMS)


def test_answers_are_judged_as_in_training_without_its_schedule():
    truth = '<think> x </think>\n<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>'
    texts = [
        truth,
        truth.replace('"a": 1', '"a": 2'),
        "<think> no tags closed",
        "\udcff".encode("utf-8", "ignore").decode(),
    ]
    table = [bytes([i]) for i in range(256)]
    rollouts = tuple(
        Rollout(
            prompt_id="p",
            token_ids=np.frombuffer((text + "<|im_end|>").encode(), np.uint8).astype(np.int32),
            log_probs=np.zeros(len((text + "<|im_end|>").encode()), np.float32),
            loss_mask=np.ones(len((text + "<|im_end|>").encode()), bool),
            stop_reason=StopReason.EOS,
            policy_version=0,
        )
        for text in texts
    )
    prompt = PromptSample(prompt_id="p", token_ids=np.zeros(1, np.int32), ground_truth=truth)
    scheduled = RewardConfig(schedule=True, schedule_steps=7)
    row = judge_group(RolloutGroup(prompt=prompt, rollouts=rollouts), table, scheduled)
    static = RewardConfig(schedule=False)
    expected = [tool_call_reward(text, truth, step=99, config=static) for text in texts]
    assert row["answer"] == [text + "<|im_end|>" for text in texts]
    assert row["reward"] == [r.total for r in expected] and row["reward"][:1] == [4.0]
    assert row["accuracy"] == [r.accuracy for r in expected] and len(set(row["accuracy"])) == 3
    assert row["format_valid"] == [1.0, 1.0, 0.0, 0.0]
