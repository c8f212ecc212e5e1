"""Tables of how an experiment's runs trained, from metrics with known numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_rest.analysis.series import load_runs
from megatron_rest.eval.outcomes import Experiment, Policy
from megatron_rest.eval.training_tables import entropy_lines, rate_rewards, tokens_of, training_lines, tuning_lines


def make_run(folder: Path, rewards: list[float], *, length: float = 50.0, count: float = 20.0) -> Path:
    """A step for each reward, of 1,000 tokens unless said otherwise; half of them format, half thoughts."""
    folder.mkdir(parents=True)
    rows = []
    for step, reward in enumerate(rewards, start=1):
        metrics = {
            "reward/static": reward, "reward/accuracy": reward / 10, "reward/format_valid": 1.0,
            "response/length": length, "rollout/count": count, "optimizer/grad_norm": 0.5,
            "tokens/format": 0.498, "tokens/think": 0.498, "tokens/response": 0.004, "entropy/format": 0.25,
            "entropy/response": 2.0,
        }  # fmt: skip
        if step == 1:
            metrics["entropy/think"] = 1.5  # gone in later steps: no thoughts were written
        rows.append({"step": step, "policy_version": step, "metrics": metrics, "seconds": {"total": 30.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    """GRPO's rewards rise by 1 a step, the constants' are 2 above, and their answers half as long."""
    policies: dict[str, list[Policy]] = {"grpo": [], "paper": []}
    for seed in (1, 2):
        for name, above, length in (("grpo", 0.0, 50.0), ("paper", 2.0, 25.0)):
            rewards = [step + above + seed / 10 for step in range(8)]
            [run] = load_runs([make_run(tmp_path / name / f"seed-{seed}", rewards, length=length)])
            policies[name].append(Policy(seed=seed, run=run, scores={}))
    return Experiment(folder=tmp_path, start={}, policies=policies)


def test_first_and_last_steps_and_the_curve_as_a_number(experiment):
    lines = training_lines(experiment)
    assert "| first 2 -> last 2 steps |" in lines[2], "a quarter of the run"
    assert "| GRPO | 0.65 -> 6.65 | 0.065 -> 0.665 | 1.00 -> 1.00 | 50 -> 50 | 0.50 | 30 |" in lines
    assert any("first 4.0 thousand tokens" in line for line in lines), "the constants' eight steps of 500"
    # GRPO spent 4,000 tokens on its first four steps (mean 1.5), the constants on all eight (3.5 + 2).
    assert any(line.startswith("| GRPO | 1.65 |  | 0.165 |  |") for line in lines)
    assert any(line.startswith("| ResT, paper | 5.65 | +4.000 (+4.000 to +4.000) | 0.565 | +0.400 (") for line in lines)


def test_a_step_counts_by_its_tokens(tmp_path):
    """The last of GRPO's steps reaches beyond the budget, so only a part of it counts."""
    of = {
        "grpo": [make_run(tmp_path / f"g{i}", [1.0, 5.0], length=100.0) for i in (1, 2)],
        "paper": [make_run(tmp_path / f"p{i}", [1.0, 1.0, 1.0], length=50.0) for i in (1, 2)],
    }
    policies = {
        name: [Policy(seed=i, run=load_runs([path])[0], scores={}) for i, path in enumerate(paths, start=1)]
        for name, paths in of.items()
    }
    lines = training_lines(Experiment(folder=tmp_path, start={}, policies=policies))
    expected = (2000 * 1.0 + 1000 * 5.0) / 3000
    assert any(line.startswith(f"| GRPO | {expected:.2f} |") for line in lines)


def test_entropies_by_region_leave_out_steps_without_them(experiment):
    lines = entropy_lines(experiment)
    assert lines[2] == "| first 2 -> last 2 steps | format: entropy | tokens | think: entropy | tokens |"
    assert "| GRPO | 0.25 -> 0.25 | 50% -> 50% | 1.50 -> - | 50% -> 50% |" in lines
    assert lines[-5] == "| last 2 steps, each seed | share of the tokens that are thoughts | valid format |"
    assert lines[-2] == "| ResT, paper | 50%, 50% | 1.00, 1.00 |"


def test_a_value_that_was_not_finite_is_shown_and_not_left_out(experiment):
    experiment.policies["grpo"][0].run.rows[-1]["metrics"].update({"reward/static": None, "entropy/format": None})
    assert any(line.startswith("| GRPO | 0.65 -> nan | 0.065 -> 0.665 |") for line in training_lines(experiment))
    assert any(line.startswith("| GRPO | 0.25 -> nan | 50% -> 50% | 1.50 -> - |") for line in entropy_lines(experiment))


def test_learning_rates_with_the_one_that_was_taken(tmp_path):
    assert tuning_lines(tmp_path) == [] and rate_rewards(tmp_path) == {}
    for rate, last in ((2e-5, 1.0), (5e-5, 3.0), (1e-4, 2.0)):
        make_run(tmp_path / "tuning" / f"grpo-{rate:g}", [-50.0, *[last] * 6])
    (tmp_path / "tuning" / "paper-5e-05").mkdir()  # still training
    assert rate_rewards(tmp_path) == {"grpo": {2e-5: 1.0, 5e-5: 3.0, 1e-4: 2.0}}
    assert "| GRPO | 1.00 | 3.00 | 2.00 | 5e-05 |" in tuning_lines(tmp_path)


def test_a_run_that_does_not_count_its_tokens_is_refused(tmp_path):
    [run] = load_runs([make_run(tmp_path / "run", [1.0, 2.0])])
    assert np.array_equal(tokens_of(run), [1000, 1000])
    del run.rows[1]["metrics"]["rollout/count"]
    with pytest.raises(ValueError, match="curves are by tokens"):
        tokens_of(run)
