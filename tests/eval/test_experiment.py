"""Tables and figures of the experiment, from folders with known numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from megatron_rest.analysis.evidence import EVIDENCE_FILE
from megatron_rest.config import RestConfig, RewardConfig, to_dict
from megatron_rest.eval import experiment_plots
from megatron_rest.eval.benchmark_scores import BENCHMARKS_FILE, benchmark_lines, benchmark_outcomes
from megatron_rest.eval.experiment import main, variance_lines
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
    for name in ("training", "seeds", "entropy", "differences", "weights"):
        pixels = imread(folder / "plots" / f"{name}.png")[..., :3]
        assert 0.005 < (pixels < 0.9).any(axis=-1).mean() < 0.8, name


def asked(folder: Path, level: str, relevance: str, *, cases: str = "a") -> None:
    """Answers to benchmarks: a one for each right one."""
    parts = {"level-1": ("api-bank", level), "irrelevance": ("bfcl", relevance), "multiple": ("bfcl", "")}
    categories = {
        name: {"benchmark": benchmark, "all": 9, "fitting": 4, "cases_sha256": cases, "correct": correct}
        for name, (benchmark, correct) in parts.items()
    }
    (folder / BENCHMARKS_FILE).write_text(json.dumps({"categories": categories}))


def test_benchmarks_by_hand(folder):
    assert benchmark_outcomes(read_experiment(folder)) == []
    asked(folder / "base" / "warm-start", "0001", "00")
    for seed, right in ((1, "1001"), (2, "0001")):
        asked(folder / "grpo" / f"seed-{seed}", right, "10")
        asked(folder / "dr_grpo" / f"seed-{seed}", "1111", "10")
    asked(folder / "entropy_ema" / "seed-3", "0000", "11")  # GRPO's third seed was not asked
    outcomes = benchmark_outcomes(read_experiment(folder))
    found = {(o.algorithm, o.category): o for o in outcomes}
    assert {o.category for o in outcomes} == {"api-bank", "level-1", "bfcl", "irrelevance"}, "multiple: none fits"
    assert found["start", "level-1"].accuracy == 0.25 and found["start", "level-1"].difference_over_seeds is None
    assert found["grpo", "level-1"].accuracy == pytest.approx(0.375) and found["grpo", "level-1"].seeds == (1, 2)
    better = found["dr_grpo", "api-bank"]
    assert better.difference_over_seeds and better.difference_over_seeds.estimate == pytest.approx(0.625)
    assert better.difference_over_cases and better.difference_over_cases.low > 0
    assert (better.cases, better.fitting, better.all) == (4, 4, 9)
    alone = found["entropy_ema", "irrelevance"]
    assert alone.accuracy == 1.0 and alone.difference_over_seeds is None and alone.difference_over_cases is None
    text = "\n".join(benchmark_lines(outcomes))
    assert "| category | asked, of those that fit, of all | warm start | GRPO | Dr. GRPO | ResT, entropy-EMA |" in text
    assert "| level-1 | 4, 4, 9 | 0.250 | 0.375 | 1.000 | 0.000 |" in text
    assert "| all | 2, 4, 9 | 0.000 | 0.500 | 0.500 | 1.000 |" in text
    assert "| Dr. GRPO | 1, 2 | +0.625 (" in text and "| ResT, entropy-EMA | 3 |  |  |" in text
    asked(folder / "grpo" / "seed-1", "1111", "11", cases="b")
    assert main([str(folder)]) == 2


def evidence(step: int) -> dict[str, object]:
    """A step of variance.json: weights by 1/H have half of the variance; half of it lies in thoughts."""
    row = {"variance": 1.0, "standard_error": 0.1, "signal": 0.0}
    regions = {"format": 0.5, "think": 0.5}
    return {
        "step": step, "num_sequences": 40, "num_groups": 5, "num_tokens": 9, "num_parameters": 7, "model": "hf",
        "mean_abs_log_ratio": 0.0, "sketch": 65_521,
        "variance": [
            {"name": "uniform", "ratio": 1.0, "ratio_standard_error": 0.0, **row},
            {"name": "1/H, as trained", "ratio": 0.5, "ratio_standard_error": 0.05, **row},
        ],
        "gradient": {name: {"of_squares": share, "of_tokens": 1 - share} for name, share in regions.items()},
        "entropy": {"regions": {name: {"entropy": 0.25, "tokens": 3, "score_norm": 0.1} for name in regions}},
    }  # fmt: skip


def test_variance_beside_runs_is_in_the_report(folder, capsys):
    assert variance_lines(read_experiment(folder)) == []
    (folder / "grpo" / "seed-1" / EVIDENCE_FILE).write_text(json.dumps({"steps": [evidence(1), evidence(4)]}))
    (folder / "dr_grpo" / "seed-1" / EVIDENCE_FILE).write_text(json.dumps({"steps": [evidence(8)]}))
    assert main([str(folder)]) == 0
    text = (folder / "results.md").read_text()
    assert "| run | step | rollouts | prompts | 1/H, as trained |" in text
    assert "| GRPO, seed 1 | 4 | 40 | 5 | 0.50 +- 0.05 |" in text and "| Dr. GRPO, seed 1 | 8 | 40 |" in text
    assert "| GRPO, seed 1 | 1 | think | 0.250 | 50.0% | 50.0% |" in text
    assert 0.005 < (imread(folder / "plots" / "variance.png")[..., :3] < 0.9).any(axis=-1).mean() < 0.8


def test_curves_are_by_tokens_with_bands_over_seeds(folder):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    assert isinstance(axis, Axes)
    experiment = read_experiment(folder)
    experiment_plots._curves(axis, experiment, "reward/static")
    assert [line.get_label() for line in axis.lines] == [TITLES[name] for name in ALGORITHMS]
    assert len(axis.collections) == len(ALGORITHMS), "a band each"
    at, values = axis.lines[0].get_data()
    lengths = [64 * (90 + step) for step in range(1, 9)]
    assert at[-1] == pytest.approx(sum(lengths) / 1000) and at[0] == pytest.approx(sum(lengths[:2]) / 1000)
    assert values[-1] == pytest.approx(0.75), "mean of the last two steps, in which every prompt is asked once"


def test_algorithms_with_fewer_seeds_leave_the_pictures_of_means_and_are_drawn_run_by_run(folder):
    (folder / "dr_grpo" / "seed-3" / RESULT_FILE).unlink()
    answers(folder / "dr_grpo" / "seed-2", 8.0)  # its two seeds are 1.1 and 6 above GRPO's
    experiment = read_experiment(folder)
    training = experiment_plots._training(experiment)
    for axis in training.axes:
        assert [line.get_label() for line in axis.lines] == [TITLES["grpo"], TITLES["entropy_ema"]]
    assert "1 methods with fewer seeds are in seeds.png" in training.get_supxlabel()
    panels = experiment_plots._seeds(experiment).axes
    assert [axis.get_title() for axis in panels] == [TITLES[name] for name in ALGORITHMS]
    assert [len(axis.lines) for axis in panels] == [1 + 3, 1 + 2, 1 + 3], "GRPO's mean and every run"
    reward = experiment_plots._differences(experiment, outcomes(experiment)).axes[0]
    ends = {tuple(line.get_xdata()) for line in reward.lines if len(line.get_xdata()) == 2}
    two_seeds = max(ends, key=lambda end: end[1] - end[0])
    low, high = reward.get_xlim()
    assert low > two_seeds[0] and high < two_seeds[1], "an interval of two seeds runs out of the picture"
    others = ends - {two_seeds}
    assert all(low < end[0] and end[1] < high for end in others)


def test_only_finished_and_common_seeds_are_compared(folder, capsys):
    (folder / "grpo" / "seed-3" / "config.yaml").unlink()  # still training
    (folder / "dr_grpo" / "seed-1" / RESULT_FILE).unlink()  # not yet asked
    experiment = read_experiment(folder)
    assert experiment.seeds == [1, 2] and list(experiment.policies) == ["grpo", "entropy_ema"]
    assert experiment.left_out == {"dr_grpo": 1}, "of its seeds 2 and 3 the baseline has 2"
    assert main([str(folder)]) == 0
    assert "Left out, with fewer than the two seeds that an interval needs: Dr. GRPO (1)." in capsys.readouterr().out
    (folder / "entropy_ema" / "seed-1" / RESULT_FILE).unlink()
    with pytest.raises(ValueError, match="grpo 2, dr_grpo 1, entropy_ema 1; an interval needs 2"):
        read_experiment(folder)


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
