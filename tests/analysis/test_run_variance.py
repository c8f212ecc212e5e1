"""A run's own rollouts: the command on a folder as the trainer leaves it, against gradients taken the direct way."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_rest.analysis.gradient_variance import GradientSketch
from megatron_rest.analysis.report import write_report
from megatron_rest.analysis.run_gradients import _whole_groups, measure_gradients, measure_run
from megatron_rest.analysis.variance import main
from megatron_rest.config import load, to_dict
from megatron_rest.data.rollout_file import SavedRollouts, read_rollouts, write_rollouts
from megatron_rest.types import TokenRegion
from megatron_rest.weighting import RestWeighting
from tests.analysis.runs import make_run
from tests.helpers.policies import random_samples
from tests.helpers.tiny_model import VOCAB_SIZE, build_tiny_model

TEMPERATURE = 0.8
EXPORTED = "hf_step_000002"


def rollouts_of(step: int, *, count: int = 8, with_beta: bool = False) -> SavedRollouts:
    """Four groups of two; the second sequence has no advantage."""
    samples = random_samples(VOCAB_SIZE, count=count, seed=step)
    samples[1] = replace(samples[1], advantage=0.0)
    total = sum(len(s.token_ids) for s in samples)
    names = ("old_log_probs", "entropy", "token_weights", *(["beta"] if with_beta else []))
    return SavedRollouts.of(
        samples,
        step=step,
        progress=0.0,
        rewards=[1.0] * count,
        group_ids=[i // 2 for i in range(count)],
        scores={name: np.full(total, i, np.float32) for i, name in enumerate(names)},
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", 3)
    for path, seed in ((folder / "start", 0), (folder / "hf", 1)):
        build_tiny_model(path, with_tokenizer=False, seed=seed)
    config = load(overrides=[f"model.path={folder / 'start'}", "trainer.steps=3"])
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    for step in (1, 2, 3):
        write_rollouts(folder, rollouts_of(step))
    return folder


def load_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def direct_gradient(model: torch.nn.Module, rollouts: SavedRollouts, at: slice, weights: np.ndarray) -> torch.Tensor:
    """Gradient of sum_t w_t log pi(t), written the plain way."""
    ids = torch.from_numpy(rollouts.token_ids[at].astype(np.int64))
    log_p = (model(ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
    log_probs = log_p.gather(-1, ids[1:, None])[:, 0]
    objective = (torch.from_numpy(weights[1:]) * log_probs).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(model.parameters()))])


@pytest.mark.parametrize("block_bytes", [1 << 30, 1])
def test_gram_holds_the_gradients_of_the_weighted_objective(run_dir, block_bytes):
    model, rollouts = load_model(run_dir / "start"), read_rollouts(run_dir / "rollouts" / "step_000001.npz")
    memory = {"block_bytes": block_bytes, "max_blocks": 10**6}
    measured = measure_gradients(model, rollouts, max_sequences=5, temperature=TEMPERATURE, **memory)
    assert measured.sketch == 0
    assert len(measured.scale) == 4, "whole groups only"
    weighting = RestWeighting.paper()
    table = weighting.region_weights(0.0)
    coefficients = measured.scale[:, None] * table
    gradients = []
    for i, at in enumerate(rollouts.slices[:4]):
        raw = np.where(rollouts.loss_mask[at], table[rollouts.region_ids[at]], 0.0)
        gradients.append(measured.scale[i] * direct_gradient(model, rollouts, at, raw).double())
    stacked = torch.stack(gradients).numpy()
    inner = stacked @ stacked.T
    np.testing.assert_allclose(measured.gram._inner(coefficients), inner, rtol=1e-4, atol=1e-6 * inner.max())
    squares = {}
    for region in (r for r in TokenRegion if r):
        parts = [
            measured.scale[i]
            * direct_gradient(model, rollouts, at, np.where(rollouts.region_ids[at] == region, 1.0, 0.0))
            for i, at in enumerate(rollouts.slices[:4])
        ]
        squares[region.name.lower()] = sum(float(part.double().square().sum()) for part in parts)
    shares = measured.gram.by_region(measured.scale, measured.region_counts)
    for name, share in shares.items():
        assert share["of_squares"] == pytest.approx(squares[name] / sum(squares.values()), rel=1e-3)
    lengths = [int(rollouts.loss_mask[at].sum()) for at in rollouts.slices[:4]]
    np.testing.assert_allclose(measured.scale, rollouts.advantages[:4] / lengths)
    assert measured.scale[1] == 0
    assert len(measured.entropy) == sum(lengths), "tokens without advantage have an entropy all the same"


def test_some_answers_of_more_prompts():
    groups = np.array([4, 4, 4, 7, 7, 7, 9, 9, 9])
    assert _whole_groups(groups, 6, 2).tolist() == [0, 1, 3, 4, 6, 7]
    assert _whole_groups(groups, 5, 2).tolist() == [0, 1, 3, 4], "whole groups only"
    assert _whole_groups(groups, 6, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert _whole_groups(groups, 2, 0).tolist() == [0, 1], "one that is too large alone is cut"


def test_sketches_of_gradients_that_do_not_fit_give_the_same_variance(run_dir):
    model, rollouts = load_model(run_dir / "start"), read_rollouts(run_dir / "rollouts" / "step_000001.npz")
    whole = measure_gradients(model, rollouts, max_sequences=8, temperature=TEMPERATURE)
    sketched = measure_gradients(model, rollouts, max_sequences=8, temperature=TEMPERATURE, max_blocks=0)
    assert (whole.sketch, sketched.sketch) == (0, 65_521)
    norms = np.diag(whole.gram.gram)
    assert ((norms > 0) == (np.diag(sketched.gram.gram) > 0)).all()
    scale = np.sqrt(np.outer(norms, norms))[np.ix_(norms > 0, norms > 0)]
    gap = (sketched.gram.gram - whole.gram.gram)[np.ix_(norms > 0, norms > 0)] / scale
    assert np.abs(gap).max() < 0.03


def test_the_report_says_that_products_are_estimates(run_dir, monkeypatch, capsys):
    monkeypatch.setattr("megatron_rest.analysis.run_gradients._MAX_BLOCKS", 0)
    assert main(["--run", str(run_dir), "--max-sequences", "2"]) == 0
    assert "(estimated from sketches of 65,521 numbers a gradient)" in capsys.readouterr().out


def test_a_sketch_keeps_inner_products_on_average_and_exactly_where_it_has_room():
    parameters = [torch.zeros(7, 3), torch.zeros(5), torch.zeros(64)]
    rng = torch.Generator().manual_seed(0)
    x, y = ([torch.randn(p.shape, generator=rng) for p in parameters] for _ in range(2))
    true = float(sum((a * b).sum() for a, b in zip(x, y, strict=True)))
    room = GradientSketch(parameters, columns=97)
    assert float(room(x) @ room(y)) == pytest.approx(true, rel=1e-5)
    found = []
    for seed in range(400):
        sketch = GradientSketch(parameters, columns=11, seed=seed)
        found.append(float(sketch(x) @ sketch(y)))
    error = np.std(found) / np.sqrt(len(found))
    assert error > 0
    assert abs(np.mean(found) - true) < 4 * error
    with pytest.raises(ValueError, match="columns is 0"):
        GradientSketch(parameters, columns=0)


def test_command_writes_json_and_figures_and_the_report_shows_them(run_dir, capsys):
    assert main(["--run", str(run_dir), "--max-sequences", "6"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((run_dir / "variance.json").read_text())
    assert [step["step"] for step in report["steps"]] == [1, 3], "step 2's weights are nowhere"
    assert len(report["assumptions"]) == 4
    first = report["steps"][0]
    assert (first["num_sequences"], first["num_groups"], first["model"]) == (6, 3, "start")
    assert first["variance"][0]["name"] == "uniform"
    assert all(row["ratio"] > 0 and row["ratio_standard_error"] >= 0 for row in first["variance"])
    assert set(first["entropy"]["regions"]) == {r.name.lower() for r in TokenRegion if r}
    assert -1 <= first["entropy"]["correlation"] <= 1
    assert [x for x, _ in first["entropy"]["tenths"]] == sorted(x for x, _ in first["entropy"]["tenths"])
    for share in ("of_squares", "of_tokens"):
        assert sum(region[share] for region in first["gradient"].values()) == pytest.approx(1)
    for step in (1, 3):
        for figure in ("variance", "entropy"):
            assert (run_dir / "plots" / f"{figure}_step_{step:06d}.png").stat().st_size > 5000
    lines, _ = write_report([run_dir], run_dir / "plots")
    for line in (*printed.splitlines()[:12],):
        assert line in lines


def test_a_step_between_is_measured_with_its_exported_checkpoint(run_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    assert main(["--run", str(folder), "--max-sequences", "4", "--steps", "1", "2"]) == 2
    assert f"weights ({EXPORTED}" in capsys.readouterr().err
    shutil.copytree(folder / "hf", folder / EXPORTED)
    assert [step["step"] for step in measure_run(folder, max_sequences=4)] == [1, 2, 3]
    [found] = measure_run(folder, max_sequences=4, steps=[2])
    assert (found["step"], found["model"]) == (2, EXPORTED)


def test_what_cannot_be_measured_is_one_clear_line(run_dir, tmp_path, capsys):
    cases = {"no config.yaml": lambda: None}
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    for words in ("no rollouts of the first or the last step", "no model in"):
        assert main(["--run", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
        write_rollouts(tmp_path, rollouts_of(3))
    assert main(["--run", str(tmp_path / "none")]) == 2
    assert next(iter(cases)) in capsys.readouterr().err


def test_statistics_are_those_of_the_softmax(run_dir):
    model, rollouts = load_model(run_dir / "hf").double(), read_rollouts(run_dir / "rollouts" / "step_000003.npz")
    measured = measure_gradients(model, rollouts, max_sequences=2, temperature=TEMPERATURE)
    at = rollouts.slices[0]
    ids = torch.from_numpy(rollouts.token_ids[at].astype(np.int64))
    with torch.no_grad():
        out = model(ids[None], output_hidden_states=True)
    mask = rollouts.loss_mask[at][1:]
    p = (out.logits[0, :-1] / TEMPERATURE).softmax(-1).numpy()[mask]
    squared_norm = out.hidden_states[-1][0, :-1].square().sum(-1).numpy()[mask]
    n = len(p)
    np.testing.assert_allclose(measured.entropy[:n], -(p * np.log(p)).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(measured.score_norm[:n], 1 - (p**2).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(measured.beta[:n], squared_norm * (1 - (p**2).sum(-1)) / TEMPERATURE**2, rtol=1e-9)
    label = p[np.arange(n), ids[1:].numpy()[mask]]
    np.testing.assert_allclose(
        measured.log_ratio[:n], np.log(label) - rollouts.rollout_log_probs[at][1:][mask], rtol=1e-9
    )


def test_measure_run_needs_no_more_than_the_run(run_dir):
    assert [step["step"] for step in measure_run(run_dir, max_sequences=2)] == [1, 3]
