"""The main job at toy size: real data, real Megatron TP2 x PP2, real vLLM, through the worker entries a launcher
starts.

1. warm start lowers the loss and leaves a folder that transformers loads
2. RL steps: every promised number is there, the canary holds, the weights move, the export is what was trained
3. saved rollouts are what was trained on; variance_optimal weights come from the score norms of the scoring pass;
   the published code's leave glue out; an exported policy answers sets of prompts; token credit, advantages and loss
   by name, a rule of one's own among them
4. updates that were recorded agree with float64
5. SIGTERM to one rank stops all of them after their step, saved; the next start continues, and writes the same numbers
   as a run that was never stopped (and recorded nothing); a third start finds nothing to do
6. benchmarks are answered by the policy of the version that is named, and scored as the command scores them
7. one step off, rollouts are one version old
8. nothing is left behind, however a run ends
9. what a user gets wrong is one clear line and a non-zero exit status
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks import chaos, long_run
from megatron_rest.analysis.metric_table import find_metric
from megatron_rest.commands import tiny
from megatron_rest.commands.run_diff import compare_checkpoints, compare_runs
from megatron_rest.config import WeightingConfig, WeightSource
from megatron_rest.data.rollout_file import read_rollouts, rollout_files, rollout_path
from megatron_rest.data.sample_file import FIELDS, read_sample_rows, sample_files
from megatron_rest.eval.answers import read_answers
from megatron_rest.replay import __main__ as replay
from megatron_rest.trainer.entry import STOPPED_STATUS
from megatron_rest.weighting import RestWeighting, region_sums
from tests.helpers import forked
from tests.helpers.tiny_model import build_tiny_model, read_config

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m"]


def call(*arguments: str, ranks: int = 0, check: bool = True) -> subprocess.CompletedProcess[str]:
    """``python -m arguments`` (with ``ranks``: under torchrun) in the project's root, imports done."""
    done = forked.run_module(*arguments, ranks=ranks)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(arguments)} failed:\n{done.stdout[-3000:]}\n{done.stderr[:8000]}")
    return done


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Tokenizer, prompts and a random model, made by the commands of the demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "run_command", lambda *arguments: call(*arguments))
        return tiny.make_base(tmp_path_factory.mktemp("base"))


def settings(base: Path, run_dir: Path, model: Path) -> list[str]:
    return [
        f"model.path={model}",
        f"data.train={base / 'train'}",
        f"trainer.run_dir={run_dir}",
        "model.max_sequence_length=352",
        "data.max_prompt_tokens=256",
        "rollout.max_response_tokens=96",
        "data.require_reachable=true",
        "trainer.max_tokens_per_microbatch=1024",
    ]


@pytest.fixture(scope="module")
def warm(base) -> tuple[Path, str]:
    run_dir = base / "warm-start"
    overrides = ["warm_start.epochs=3", "warm_start.batch_size=8", "warm_start.lr=5e-3"]
    done = call("megatron_rest.commands.warm_start", *settings(base, run_dir, base / "model"), *overrides, ranks=2)
    return run_dir / "hf", done.stdout


def rl_arguments(base: Path, run_dir: Path, model: Path) -> list[str]:
    return [
        "megatron_rest.trainer",
        *settings(base, run_dir, model),
        "parallel.tensor_parallel=2",
        "parallel.pipeline_parallel=2",
        "data.prompts_per_step=6",
        "rollout.rollouts_per_prompt=4",
        "optimizer.lr=1e-3",
        "optimizer.updates_per_step=2",
        "loss.entropy_coef=0.01",  # gradients also where all siblings of a group fail alike
        "checkpoint.save_every=1",
        "checkpoint.keep_last=3",
        "checkpoint.asynchronous=true",
        "validation.every=2",
        "validation.categories=level-2,simple_python",
        "validation.cases=3",
        f"trainer.steps={STEPS}",
    ]


def rl(base: Path, run_dir: Path, model: Path, *overrides: str) -> None:
    call(*rl_arguments(base, run_dir, model), *overrides, ranks=4)


@pytest.fixture(scope="module")
def unbroken(base, warm) -> Path:
    """The run that most tests read: under torchrun, as a user starts it."""
    run_dir = base / "unbroken"
    command = [*TORCHRUN, *rl_arguments(base, run_dir, warm[0]), "trainer.replay_every=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[:8000]
    return run_dir


def timeless(rows: list[dict]) -> list[dict]:
    """What has to be the same in every run."""
    rows = json.loads(json.dumps(rows))
    for row in rows:
        row.pop("seconds")
        row["metrics"].pop("sync/seconds")
    return rows


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_warm_start_learns_and_exports(base, warm):
    folder, output = warm
    found = re.search(r"loss ([\d.]+) in the first pass, ([\d.]+) in the last", output)
    assert found, output
    assert float(found[2]) < 0.8 * float(found[1])
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    fresh = load_file(base / "model" / "model.safetensors")
    assert fresh.keys() <= trained.keys()
    moved = [name for name, tensor in fresh.items() if not torch.equal(tensor, trained[name])]
    assert moved == list(fresh), "every parameter was trained and exported"


@pytest.mark.slow
def test_steps_report_every_promised_number(unbroken):
    rows = metrics(unbroken)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["policy_version"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert not row.get("nonfinite")
        values = row["metrics"]
        for name in ("reward/total", "reward/format", "reward/correctness", "response/length", "entropy/all"):
            assert name in values
        assert 0 < values["response/length"] <= 96
        assert 0 < values["entropy/all"] < 7
        regions = [name for name in values if name.startswith("weight_mass/")]
        assert sum(values[name] for name in regions) == pytest.approx(1.0)
        assert values["optimizer/grad_norm"] > 0
        assert values["mismatch/abs_log_prob_max"] < 1e-4, "vLLM and Megatron hold the same weights, in float32"
        assert values["sync/canary_max_abs"] < 1e-4
        phases = {"rollout", "reward", "score", "weights", "update", "sync", "checkpoint"}
        assert set(row["seconds"]) >= {*phases, "total"}
        assert sum(s for name, s in row["seconds"].items() if name != "total") <= row["seconds"]["total"]
        keys = [*values, *(f"seconds/{phase}" for phase in row["seconds"])]
        assert [key for key in keys if find_metric(key) is None] == [], "every key is in the table of metrics"


def test_validation_is_what_the_exported_policy_answers(unbroken, tmp_path):
    """TP 2 x PP 2, an engine in every rank; the last version's answers again, from the export and from a checkpoint."""
    folder = unbroken / "validation"
    assert sorted(path.name for path in folder.iterdir()) == ["version_000000", "version_000002", "version_000003"]
    rows = metrics(unbroken)
    assert [sorted(n for n in row["metrics"] if n.startswith("validation/")) != [] for row in rows] == [
        False,
        True,
        True,
    ]
    for step in (2, 3):
        for benchmark, category in (("api-bank", "level-2"), ("bfcl", "simple_python")):
            path = folder / f"version_{step:06d}" / benchmark
            summary = json.loads((path / "summary.json").read_text())
            accuracy = summary["categories"][category]["accuracy"]["estimate"]
            assert rows[step - 1]["metrics"][f"validation/{benchmark}/{category}/accuracy"] == accuracy
            assert (summary["policy_version"], summary["all"]["cases"]) == (step, 3)
            assert summary["decontamination"][0]["passes"] == []
            assert len(read_answers(path / "answers.jsonl")) == 3
        assert rows[step - 1]["seconds"]["validation"] > 0
    options = ["--categories", "level-2", "simple_python", "--cases", "3", "--max-model-len", "352"]
    options += ["--max-response-tokens", "96", "--leave-out-long", "--kv-cache-gib", "0.05"]
    for step, version in ((None, 3), (2, 2)):
        output = tmp_path / f"version-{version}"
        chosen = ["--step", str(step)] if step else []
        call("megatron_rest.cli", "eval", "run", str(unbroken), *chosen, "--output", str(output), *options)
        for benchmark in ("api-bank", "bfcl"):
            again = read_answers(output / benchmark / "answers.jsonl")
            assert again == read_answers(folder / f"version_{version:06d}" / benchmark / "answers.jsonl")
            ours, theirs = (
                json.loads((path / benchmark / "summary.json").read_text())
                for path in (output, folder / f"version_{version:06d}")
            )
            assert ours["categories"] == theirs["categories"] and ours["decontamination"] == theirs["decontamination"]
    assert read_answers(output / "bfcl" / "answers.jsonl") != read_answers(folder / "version_000000/bfcl/answers.jsonl")


def test_run_leaves_checkpoint_events_and_a_model(unbroken, warm):
    assert (unbroken / "checkpoints" / "step_000003" / "metadata.json").is_file()
    assert list((unbroken / "tensorboard").iterdir())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(unbroken / "hf")
    assert len(AutoTokenizer.from_pretrained(unbroken / "hf")) == model.config.vocab_size
    before, after = load_file(warm[0] / "model.safetensors"), load_file(unbroken / "hf" / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not list(unbroken.glob("**/*.partial"))


@pytest.mark.extended
@pytest.mark.alone
def test_bfloat16_on_both_sides_keeps_the_canary_in_its_band(base, warm):
    run_dir = base / "bfloat16"
    overrides = ("model.dtype=bfloat16", "rollout.dtype=bfloat16", "checkpoint.export_hf=false", "trainer.steps=1")
    rl(base, run_dir, warm[0], *overrides)
    [row] = metrics(run_dir)
    assert 1e-5 < row["metrics"]["sync/canary_max_abs"] < 0.1
    assert 1e-5 < row["metrics"]["mismatch/abs_log_prob_mean"] < 0.05


@pytest.mark.extended
@pytest.mark.alone
def test_engines_in_fp8_sample_a_rounded_policy_that_training_corrects_for(base, warm):
    run_dir = base / "fp8-engines"
    engines = ("rollout.replicas=1", "rollout.tensor_parallel=2", "weight_sync.transport=gloo", "loss.tis_cap=2.0")
    options = ("rollout.quantization=fp8_channel", "checkpoint.export_hf=false", "trainer.steps=1")
    rl(base, run_dir, warm[0], *engines, *options)
    [row] = metrics(run_dir)
    assert 1e-3 < row["metrics"]["sync/canary_max_abs"] < 1
    assert 1e-3 < row["metrics"]["mismatch/abs_log_prob_mean"] < 0.3
    assert 0 <= row["metrics"]["tis_clipped/all"] < 0.2
    model = read_config(warm[0])
    queries, keys = (model[name] * model["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    hidden, ffn, layers = (model[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    matrices = hidden * (2 * queries + 2 * keys + 3 * ffn)
    # A row's scale goes where the row goes; where columns are cut (the last two) both workers need it.
    scales = queries + 2 * keys + 2 * ffn + 2 * (hidden + hidden)
    norms = 2 * (layers * (2 * hidden + 2 * model["head_dim"]) + hidden)
    in_float32 = model["vocab_size"] * hidden + norms + layers * scales
    assert model["tie_word_embeddings"] and row["metrics"]["sync/bytes"] == layers * matrices + 4 * in_float32


def test_saved_rollouts_are_what_was_trained_on(unbroken):
    assert [step for step, _ in rollout_files(unbroken)] == [1, 3], "the first and the last"
    for step, path in rollout_files(unbroken):
        saved, row = read_rollouts(path), metrics(unbroken)[step - 1]["metrics"]
        mask = saved.loss_mask
        assert len(saved.lengths) == 24
        assert np.unique(saved.group_ids).tolist() == list(range(6))
        assert saved.rewards.mean() == pytest.approx(row["reward/total"], rel=1e-5)
        assert saved.entropy[mask].mean() == pytest.approx(row["entropy/all"], rel=1e-5)
        gap = np.abs(saved.rollout_log_probs - saved.old_log_probs)[mask]
        assert gap.max() == pytest.approx(row["mismatch/abs_log_prob_max"])
        for at in saved.slices:
            weights = saved.token_weights[at][mask[at]]
            assert weights.mean() == pytest.approx(1.0, rel=1e-5)
        rows = read_sample_rows(dict(sample_files(unbroken))[step])
        assert [row["index"] for row in rows] == list(range(24)) and all(row.keys() == FIELDS.keys() for row in rows)
        np.testing.assert_allclose([row["reward"]["total"] for row in rows], saved.rewards, rtol=1e-6)
        for row in rows:
            assert row["tools"] and row["messages"] and row["reference"]
            assert "".join(text for _, text in row["regions"]).strip("\ufffd") == row["answer"].strip("\ufffd")
    assert {step: len(read_sample_rows(path)) for step, path in sample_files(unbroken)} == {1: 24, 2: 4, 3: 24}


def test_what_teaches_nothing_is_saved_and_not_trained(base, warm):
    """Two replicas, two updates a step, extra draws, ratios to the engine: the file has every sequence, scored."""
    run_dir = base / "zero-groups"
    overrides = (
        "parallel.tensor_parallel=1", "parallel.pipeline_parallel=1", "rollout.rollouts_per_prompt=2",
        "loss.entropy_coef=0", "loss.old_log_probs=engine", "data.resample_zero_groups=1", "validation.every=0",
        "trainer.steps=1", "checkpoint.export_hf=false",
    )  # fmt: skip
    call(*rl_arguments(base, run_dir, warm[0]), *overrides, ranks=2)
    [row], [(_, path)] = metrics(run_dir), rollout_files(run_dir)
    values, saved = row["metrics"], read_rollouts(path)
    without = saved.advantages == 0
    assert len(saved.lengths) == 12 and np.unique(saved.group_ids).tolist() == list(range(6))
    assert values["pack/left_out"] == without.sum()
    assert values["advantage/zero_groups"] == np.mean([without[saved.group_ids == g].all() for g in range(6)])
    assert values["rollout/extra_draws"] in (0.0, 1.0)
    assert values["rollout/dropped_groups"] == 6 * values["rollout/extra_draws"]
    owner = np.repeat(np.arange(len(saved.lengths)), saved.lengths)
    trained = saved.loss_mask & ~without[owner]
    assert (saved.old_log_probs[saved.loss_mask] < 0).all() and (saved.entropy[saved.loss_mask] > 0).all()
    assert (saved.token_weights[saved.loss_mask] > 0).all()
    if trained.any():
        assert saved.entropy[trained].mean() == pytest.approx(values["entropy/all"], rel=1e-5)
    assert values["mismatch/abs_log_prob_max"] < 1e-4


@pytest.mark.extended
@pytest.mark.alone
def test_variance_optimal_weights_come_from_the_measured_score_norms(base, warm):
    """TP 2 with sequence parallelism, CP 2: weights in the file are those of the score norms in the file.

    The engines lie over two ranks each, as the recipes' do.
    """
    run_dir = base / "variance"
    layout = ("parallel.pipeline_parallel=1", "parallel.sequence_parallel=true", "parallel.context_parallel=2")
    overrides = (
        "rollout.tensor_parallel=2",
        "weighting.source=variance_optimal",
        "checkpoint.export_hf=false",
        "trainer.steps=1",
    )
    # What another job's engines share, or a killed one's: vLLM's own name for it is the same in every job.
    of_others = [Path("/dev/shm") / f"-tp:0-[{ranks}]-cpushm_{i}" for ranks in ("0-1", "2-3") for i in range(2)]
    before = set(os.listdir("/dev/shm"))
    mine = [path for path in of_others if path.name not in before]
    for path in mine:
        path.touch()
    try:
        rl(base, run_dir, warm[0], *layout, *overrides)
        assert all(path.stat().st_size == 0 for path in mine)
    finally:
        for path in mine:
            path.unlink()
    [row] = metrics(run_dir)
    assert row["metrics"]["mismatch/abs_log_prob_max"] < 1e-4, "scores are back in sequence order"
    assert row["metrics"]["sync/canary_max_abs"] < 1e-4
    [(step, path)] = rollout_files(run_dir)
    saved = read_rollouts(path)
    assert step == 1
    assert saved.beta is not None
    weighting = RestWeighting(WeightingConfig(source=WeightSource.VARIANCE_OPTIMAL))
    sums = region_sums(*map(torch.from_numpy, (saved.beta, saved.region_ids, saved.loss_mask)))
    weighting.update(*sums)
    assert (saved.beta[saved.loss_mask] > 0).all()
    owner = np.repeat(np.arange(len(saved.lengths)), saved.lengths)
    weights = weighting.packed(saved.region_ids, owner, progress=0.0, loss_mask=saved.loss_mask)
    np.testing.assert_allclose(saved.token_weights, weights, rtol=1e-5)
    assert np.abs(weights[saved.loss_mask] - 1).max() > 1e-4, "uniform ones would not pass the line before"


@pytest.mark.extended
@pytest.mark.alone
def test_credit_of_ones_own_by_name(base, warm):
    """One rank: a class of one's own gives the weights, with RLOO and GSPO around it; the record says so."""
    run_dir = base / "own-credit"
    source = "tests.weighting.own:LateTokens"
    overrides = ["parallel.tensor_parallel=1", "parallel.pipeline_parallel=1", f"weighting.source={source}"]
    overrides += ["weighting.options.slope=2.0", "advantage.estimator=rloo", "loss.function=gspo"]
    call(*rl_arguments(base, run_dir, warm[0]), *overrides, "trainer.steps=1", "validation.every=0", ranks=1)
    [(_, path)] = rollout_files(run_dir)
    saved = read_rollouts(path)
    for at, advantage in zip(saved.slices, saved.advantages, strict=True):
        mask = saved.loss_mask[at]
        raw = 1.0 + 2.0 * np.arange(mask.sum()) / mask.sum()
        np.testing.assert_allclose(saved.token_weights[at][mask], raw / raw.mean(), rtol=1e-5)
        np.testing.assert_array_equal(saved.token_advantages[at][mask], np.float32(advantage))
    assert np.ptp(saved.token_weights[saved.loss_mask]) > 0.9, "not uniform: 0.5 to 1.5"
    for group in np.unique(saved.group_ids):
        mine = saved.group_ids == group
        rewards, count = saved.rewards[mine].astype(np.float64), int(mine.sum())
        want = (rewards - rewards.mean()) * count / (count - 1)
        np.testing.assert_allclose(saved.advantages[mine], want, atol=1e-5)
    text = (run_dir / "config.yaml").read_text()
    assert source in text and "function: gspo" in text and "estimator: rloo" in text


@pytest.mark.extended
@pytest.mark.alone
def test_advantages_by_token_come_from_the_scoring_pass(base, warm):
    """TP 2 x PP 2: the optimal token baseline of siblings that lie in different microbatches."""
    run_dir = base / "otb"
    rl(base, run_dir, warm[0], "weighting.source=otb", "checkpoint.export_hf=false", "trainer.steps=2")
    assert [row["metrics"]["optimizer/skipped"] for row in metrics(run_dir)] == [0.0, 0.0]
    for _, path in rollout_files(run_dir):
        saved = read_rollouts(path)
        mask = saved.loss_mask
        assert saved.beta is not None and (saved.token_weights[mask] == 1).all()
        spread = [np.ptp(saved.token_advantages[at][mask[at]]) for at in saved.slices]
        assert max(spread) > 0.1, "a baseline for each token"
        for group in np.unique(saved.group_ids):
            mine = np.flatnonzero(saved.group_ids == group)
            first = [saved.token_advantages[saved.slices[i]][mask[saved.slices[i]]][0] for i in mine]
            baselines = saved.rewards[mine] - np.array(first)
            np.testing.assert_allclose(baselines, baselines[0], atol=1e-5, err_msg="one baseline a place")


@pytest.mark.extended
@pytest.mark.alone
def test_published_weights_leave_glue_out_and_the_policy_is_judged_on_prompts(base, warm):
    """One rank with ``weighting.source=reference_code``; then its export answers two sets of prompts, once."""
    run_dir = base / "published"
    overrides = ["parallel.tensor_parallel=1", "parallel.pipeline_parallel=1", "weighting.source=reference_code"]
    call(*rl_arguments(base, run_dir, warm[0]), *overrides, "trainer.steps=1", ranks=1)
    [(_, path)] = rollout_files(run_dir)
    saved = read_rollouts(path)
    owner = np.repeat(np.arange(len(saved.lengths)), saved.lengths)
    weights = RestWeighting.reference_code().packed(saved.region_ids, owner, progress=0.0, loss_mask=saved.loss_mask)
    np.testing.assert_allclose(saved.token_weights, weights, rtol=1e-5)
    ends = np.cumsum(saved.lengths) - 1
    ends = ends[np.isin(saved.token_ids[ends], [AutoTokenizer.from_pretrained(warm[0]).eos_token_id])]
    assert len(ends) and not saved.token_weights[ends].any(), "the end of the turn has no weight in the published code"
    assert saved.loss_mask[ends].all()
    [row] = metrics(run_dir)
    regions = [row["metrics"].get(f"tokens/{name}", 0.0) for name in ("format", "name", "args", "think", "response")]
    assert sum(regions) < 0.999, "glue is in no region"

    train, config = str(base / "train"), str(run_dir / "config.yaml")
    sets = ["--set", f"a={train}", "--set", f"b={train}", train]
    command = ["megatron_rest.eval.prompt_sets", str(run_dir), "--config", config, *sets, "--samples", "2"]
    said = call(*command, "--limit", "3").stdout
    result = json.loads((run_dir / "prompt_sets.json").read_text())
    a, b = result["sets"]["a"], result["sets"]["b"]
    assert [len(a), len(b)] == [3, 6]
    assert a == b[:3], "the same prompts and seeds, the same answers"
    assert a != b[3:], "a prompt asked again is answered anew"
    assert all(len(row["reward"]) == 2 and all(-3 <= r <= 4 for r in row["reward"]) for row in a)
    assert all(row["answer"][0] != row["answer"][1] for row in a), "siblings have seeds of their own"
    assert f"{run_dir}: a {np.mean([row['reward'] for row in a]):.3f} (3 prompts)" in said
    written = (run_dir / "prompt_sets.json").stat().st_mtime_ns
    assert call(*command, "--limit", "3").stdout == said
    assert (run_dir / "prompt_sets.json").stat().st_mtime_ns == written, "not asked again"
    wrong = call(*command[:4], "--set", f"a={base}", check=False)
    assert wrong.returncode == 2 and "is no prompt folder" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.extended
@pytest.mark.alone
def test_experts_train_over_two_ranks(base):
    """A mixture of experts at EP 2 x DP 2 with the distributed optimiser, and its engines follow."""
    model = build_tiny_model(
        base / "experts",
        arch="qwen3_moe",
        tied=False,
        with_tokenizer=False,
        **{name: read_config(base / "model")[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")},
    )
    for pattern in ("*token*", "*.jinja"):
        for path in (base / "model").glob(pattern):
            shutil.copy(path, model / path.name)
    run_dir = base / "experts-run"
    layout = [
        "parallel.tensor_parallel=1",
        "parallel.pipeline_parallel=1",
        "parallel.expert_parallel=2",
        "parallel.distributed_optimizer=true",
    ]
    call(*rl_arguments(base, run_dir, model), *layout, "trainer.steps=1", ranks=2)
    [row] = metrics(run_dir)
    assert row["metrics"]["optimizer/grad_norm"] > 0
    assert row["metrics"]["mismatch/abs_log_prob_max"] < 1e-4
    assert row["metrics"]["sync/canary_max_abs"] < 1e-4
    before, after = load_file(model / "model.safetensors"), load_file(run_dir / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == [], "every expert was trained"


def test_recorded_updates_agree_with_float64(unbroken, capsys):
    """TP 2 x PP 2, two updates: the first on the weights that sampled, the second with ratios other than 1."""
    bundles = sorted((unbroken / "replay").iterdir())
    assert [path.name for path in bundles] == [f"step_000003_update_{i}.safetensors" for i in (0, 1)]
    for path, has_engine in zip(bundles, (True, False), strict=True):
        assert replay.main([str(path), "--all"]) == 0
        said = capsys.readouterr().out
        assert ("rollout_log_probs" in said) == has_engine
        assert said.count("gradient ") == len(load_file(unbroken / "hf" / "model.safetensors"))


def stop_one_rank(base: Path, run_dir: Path, model: Path) -> str:
    """Start the run of ``unbroken``, send SIGTERM to rank 2 once step 1 is in its metrics; what torchrun says."""
    with subprocess.Popen(
        [*TORCHRUN, *rl_arguments(base, run_dir, model), "checkpoint.save_every=0"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 400
            while not (run_dir / "metrics.jsonl").is_file():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            ranks = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "2"]
            ranks[0].terminate()
            assert process.stderr is not None
            said = process.stderr.read()
            assert process.wait(60) != 0
            return said
        finally:
            process.kill()


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_continues_as_if_it_had_not(base, warm, unbroken, monkeypatch):
    run_dir = base / "stopped"
    said = stop_one_rank(base, run_dir, warm[0])
    assert "is saved; the same command continues" in said
    assert said.count(f"exitcode  : {STOPPED_STATUS}") == 4, said
    [saved] = (run_dir / "checkpoints").iterdir()
    assert saved.name in ("step_000001", "step_000002"), "the step that ran when the signal came"
    assert [row["step"] for row in metrics(run_dir)][-1] == int(saved.name[-6:]), "every step done is saved"
    until = len(metrics(run_dir))
    assert timeless(metrics(run_dir)) == timeless(metrics(unbroken)[:until]), "same seeds, same machine, same bits"
    # What a process killed later would have left: the steps after the checkpoint are replaced, not doubled.
    shutil.copy(unbroken / "metrics.jsonl", run_dir / "metrics.jsonl")
    rl(base, run_dir, warm[0])
    ours, theirs = metrics(run_dir), metrics(unbroken)
    assert [row["step"] for row in ours] == [1, 2, 3]
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [start["after_step"] for start in starts] == [0, int(saved.name[-6:])]
    assert starts[0]["packages"]["torch"] == metadata.version("torch")
    assert "validation/bfcl/accuracy" in ours[2]["metrics"]
    assert timeless(ours)[2] == timeless(theirs)[2], "bit for bit, though only the other one recorded its third step"
    diff = compare_runs(run_dir, unbroken, step=3)
    # Saved rollouts of steps before the stop are those of the run that was stopped; either may have them all.
    parts = {"model", "optimizer", "schedule", "random streams", "curriculum", "data order", "counters", "metrics"}
    assert {part for part, count in diff.compared.items() if count} >= {*parts, "exported weights", "rollouts"}
    assert not diff.differences, diff.differences[:5]
    # Rank 0 of four, started alone: were anything built, it would wait for the others.
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    again = call(*rl_arguments(base, run_dir, warm[0]))
    assert "finished after 3 steps: nothing to do" in again.stdout


@pytest.mark.slow
def test_one_step_off_every_rollout_is_one_version_old(base, tmp_path):
    """With rewards and a logger of a package outside the checkout, named in the configuration alone, and a trace."""
    run_dir = base / "one-step-off"
    shutil.copytree(ROOT / "examples" / "own_code" / "mytools", tmp_path / "mytools")
    overrides = ("rollout.max_staleness=1", "loss.tis_cap=2.0", "checkpoint.export_hf=false", "trainer.steps=3")
    overrides += ("validation.every=2", "validation.categories=simple_python", "validation.cases=2")
    overrides += ("reward.terms.tool_call.weight=1.0", "reward.terms.calls.function=mytools.rewards:calls_match")
    overrides += ("reward.terms.short.function=mytools.rewards:brevity", "reward.terms.short.arguments.words=5")
    overrides += ("trainer.loggers=tensorboard,mytools.loggers:PlainFile", "profile.steps=2", "reward.workers=1")
    overrides += ("weighting.source=matchtir",)  # by what calls earned
    settings = (*tiny.tiny_settings(base), "parallel.tensor_parallel=1", *overrides, f"trainer.run_dir={run_dir}")
    done = forked.run_module("megatron_rest.trainer", *settings, ranks=1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-8000:]
    for row in metrics(run_dir):
        values = row["metrics"]
        assert values["reward/calls/made"] + values["reward/calls/missing"] > 0
        wanted = sum(values[f"reward/{name}"] for name in ("tool_call", "calls", "short"))
        assert values["reward/total"] == pytest.approx(wanted)
        assert [key for key in values if find_metric(key) is None] == []
    logged = (run_dir / "log.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in logged[:-1:2]][:3] == ["step 1", "step 2", "step 3"]
    assert logged[-1] == "finished" and "plot reward" in logged
    code = yaml.safe_load((run_dir / "config.yaml").read_text())["resolved"]["user_code"]
    assert code["reward.terms.calls.function"]["file"] == str(tmp_path / "mytools" / "rewards.py")
    assert [path.name for path in (run_dir / "profile").iterdir()] == ["steps_2-2_rank_0.json.gz"]
    steps = chaos.metrics_of(run_dir)
    assert [step["rollout/staleness"] for step in steps] == [0, 1, 1]
    assert [row["policy_version"] for row in metrics(run_dir)] == [0, 1, 2]
    assert all(step["rollout/count"] == 24 for step in steps)
    assert ["validation/bfcl/accuracy" in step for step in steps] == [True, False, True], "versions 0 and 2"
    versions = sorted(path.name for path in (run_dir / "validation").iterdir())
    assert versions == ["version_000000", "version_000002", "version_000003"]
    assert steps[0]["mismatch/abs_log_prob_max"] < 1e-4 < steps[1]["mismatch/abs_log_prob_mean"]
    assert all(0 <= step["tis_clipped/all"] < 1 for step in steps) and steps[0]["tis_clipped/all"] == 0


@pytest.mark.extended
@pytest.mark.alone
def test_a_run_whose_optimiser_leaves_while_engines_sample_is_the_same(base):
    """Colocated, with a checkpoint in the middle, written while training goes on: equal bit for bit."""
    overrides = ("rollout.replicas=0", "weight_sync.transport=local", "parallel.tensor_parallel=1", "trainer.steps=3")
    overrides += ("parallel.distributed_optimizer=true", "checkpoint.save_every=1", "checkpoint.asynchronous=true")
    overrides += ("checkpoint.keep_last=3",)
    runs = [base / "state-stays", base / "state-leaves"]
    for run_dir in runs:
        flag = f"trainer.offload={str(run_dir == runs[1]).lower()}"
        settings = (*tiny.tiny_settings(base), *overrides, flag, f"trainer.run_dir={run_dir}")
        done = forked.run_module("megatron_rest.trainer", *settings, ranks=1)
        assert done.returncode == 0, done.stderr[-8000:]
    for step in (2, 3):
        diff = compare_checkpoints(*(run_dir / "checkpoints" / f"step_{step:06d}" for run_dir in runs))
        assert not diff.differences and diff.compared["optimizer"] > 0, diff.differences[:5]
    diff = compare_runs(*runs, step=3)
    assert not diff.differences and diff.compared["metrics"] > 0, diff.differences[:5]


@pytest.mark.extended
@pytest.mark.alone
def test_engines_are_two_steps_ahead_and_a_continued_run_has_what_they_had(base):
    """Rollouts are cut by new weights and go on; a run from the checkpoint of step 2 has the same ones in step 3."""
    overrides = ("rollout.max_staleness=2", "rollout.on_update=keep", "loss.tis_cap=2.0", "rollout.max_concurrent=4")
    overrides += ("trainer.steps=4", "checkpoint.save_every=1", "checkpoint.keep_last=4", "checkpoint.export_hf=false")
    overrides += ("trainer.save_rollouts_every=1", "parallel.tensor_parallel=1")
    runs = [base / "two-ahead", base / "two-ahead-again"]
    for run_dir in runs:
        again = (f"checkpoint.load={runs[0] / 'checkpoints' / 'step_000002'}",) if run_dir != runs[0] else ()
        settings = (*tiny.tiny_settings(base), *overrides, f"trainer.run_dir={run_dir}", *again)
        done = forked.run_module("megatron_rest.trainer", *settings, ranks=1)
        assert done.returncode == 0, done.stderr[-8000:]
    steps = chaos.metrics_of(runs[0])
    assert [row["policy_version"] for row in metrics(runs[0])] == [0, 1, 2, 3]
    assert all(step["rollout/count"] == 24 and step["rollout/staleness_max"] <= 2 for step in steps)
    assert max(step["rollout/staleness_max"] for step in steps) >= 1
    for step in steps:
        assert sum(step[f"tokens/age_{age}"] for age in range(3)) == pytest.approx(1.0)
        assert [key for key in step if find_metric(key) is None] == []
    first, second = (read_rollouts(rollout_path(run_dir, 3)) for run_dir in runs)
    for name in ("lengths", "token_ids", "rollout_log_probs", "versions", "old_log_probs", "advantages", "rewards"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert set(np.unique(first.versions[first.loss_mask])) <= {0, 1, 2}


@pytest.mark.parametrize("ending", ["success", "ctrl-c", "killed rank"])
@pytest.mark.extended
@pytest.mark.alone
def test_nothing_is_left_behind(ending, base):
    """However a run with an engine process ends: no process of it, no shared memory."""
    run_dir = base / f"left-{ending.replace(' ', '-')}"
    steps = 1 if ending == "success" else 1000
    command = long_run.train_command(base, run_dir, f"trainer.steps={steps}", ranks=1, replicas=1)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            seen = long_run.Watch(psutil.Process(process.pid))
            deadline = time.monotonic() + 400
            while process.poll() is None and (ending == "success" or not (run_dir / "metrics.jsonl").is_file()):
                assert time.monotonic() < deadline
                seen.look(0)
                time.sleep(0.3)
            if ending == "ctrl-c":
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            elif ending == "killed rank":
                os.kill(next(s.pid for s in seen.samples if s.role == "rank 0"), signal.SIGKILL)
            status = process.wait(120)
        finally:
            process.kill()
    assert (status == 0) == (ending == "success")
    assert {"torchrun", "rank 0", "engine"} <= {sample.role for sample in seen.samples}
    assert seen.left_behind(20.0) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lrr=1"], ["unknown configuration key optimizer.lrr", "did you mean optimizer.lr"]),
        (["model.path=/nowhere"], ["model.path=/nowhere is not a folder"]),
        (["parallel.tensor_parallel=3"], ["world size 1 does not fit"]),
        (["rollout.max_response_tokens=400"], ["exceeds model.max_sequence_length 352"]),
        (["data.train=/nowhere"], ["/nowhere"]),
    ],
    ids=["key", "model", "world", "length", "data"],
)
def test_user_errors_are_one_line(base, overrides, words, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    run_dir = base / "refused"
    done = call("megatron_rest.trainer", *settings(base, run_dir, base / "model"), *overrides, check=False)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1, done.stderr
    assert all(word in said[0] for word in words), said[0]
    assert "Traceback" not in done.stderr
    assert not run_dir.exists(), "nothing half-written"
