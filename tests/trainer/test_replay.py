"""Replay bundles: what a run recorded agrees with float64 at every layout, and what is changed in a file is named.

1. two ranks, DP 2 with the distributed optimiser, TP 2 with sequence parallelism, CP 2, PP 2 x VPP 2; with
   several losses: every term of the first and of the second update agrees
2. each term changed in the file is the first that is named, with exit status 1
3. cut, foreign and mutated files are refused in one line, with exit status 2

``tests/trainer/test_run.py`` replays a bundle of the whole trainer, rollouts of a real engine included.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rest.algorithms import RestPolicyLoss, group_relative_advantages
from megatron_rest.replay.__main__ import main
from megatron_rest.replay.bundle import BundleError, ReplayBundle, bundle_path, read_bundle, write_bundle
from megatron_rest.replay.compare import compare
from megatron_rest.replay.reference import compute
from megatron_rest.trainer.judge import Verdict
from megatron_rest.trainer.replay import record_update
from megatron_rest.types import PromptSample, RewardOutput, Rollout, RolloutGroup, StopReason, TokenRegion, TrainSample
from megatron_rest.weighting import RestWeighting
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model

GROUPS, SIBLINGS, STEP = 3, 4, 2
CLIPPED = ("loss.clip_low=0.001", "loss.clip_high=0.002", "loss.dual_clip=1.001")  # so narrow that both sides clip
LAYOUTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "dp2": ("dense", {"distributed_optimizer": True}, CLIPPED),
    "tp2": ("dense", {"tp": 2, "sp": True}, ("loss.aggregation=token_mean", "loss.tis_cap=1.5", *CLIPPED)),
    "cp2": ("dense", {"cp": 2}, ("loss.entropy_coef=0.01", "weighting.source=uniform")),
    "vpp2": ("dense", {"pp": 2, "vpp": 2}, ("loss.tis_cap=1.5", "loss.tis_level=sequence")),
}


def judged(samples: list[TrainSample], estimator: str) -> tuple[list[TrainSample], list[RolloutGroup], Verdict]:
    """Groups of four with rewards, and the samples with the advantages that follow."""
    rewards = np.random.default_rng(3).normal(size=(GROUPS, SIBLINGS))
    rewards[0] = 1.5  # a group whose advantages are 0
    advantages = group_relative_advantages(rewards, estimator=estimator).reshape(-1)
    samples = [dataclasses.replace(s, advantage=float(a)) for s, a in zip(samples, advantages, strict=True)]
    one = np.ones(1)
    groups = []
    for i in range(GROUPS):
        prompt = PromptSample(prompt_id=str(i), token_ids=one.astype(np.int32), ground_truth="")
        rollout = Rollout(
            prompt_id=str(i), token_ids=one.astype(np.int32), log_probs=one.astype(np.float32),
            loss_mask=one.astype(bool), stop_reason=StopReason.EOS, policy_version=0,
        )  # fmt: skip
        groups.append(RolloutGroup(prompt=prompt, rollouts=(rollout,) * SIBLINGS))
    outputs = tuple(
        RewardOutput(total=float(r), format=0.0, correctness=0.0, is_format_valid=True, accuracy=0.0)
        for r in rewards.reshape(-1)
    )
    verdict = Verdict(
        samples=tuple(samples),
        rewards=outputs,
        static_rewards=(),
        is_zero_group=(True,),
        num_truncated=0,
        is_judged=(True,) * len(samples),
    )
    return samples, groups, verdict


def record(rank: int, world_size: int, models: dict[str, str], folder: str) -> None:
    """Two updates of every layout, each recorded before it is done."""
    from megatron.core import parallel_state

    for name, (model, layout, overrides) in LAYOUTS.items():
        run_dir = f"trainer.run_dir={folder}/{name}"
        config = layout_config(models[model], **layout, overrides=(run_dir, "optimizer.lr=1e-4", *overrides))
        parts = make_policy(config)
        samples = random_samples(parts.shape.vocab_size, count=GROUPS * SIBLINGS)
        samples, groups, verdict = judged(samples, str(config.advantage.estimator))
        batch = batch_of(parts, samples)
        weighting = RestWeighting.from_config(config.weighting)
        scores = parts.policy.score(batch.microbatches)
        microbatches = tuple(
            m.with_scores(
                old_log_probs=s.log_probs,
                token_weights=weighting.packed(m.region_ids, m.sequence_ids, loss_mask=m.loss_mask, progress=0.25),
            )
            for m, s in zip(batch.microbatches, scores, strict=True)
        )
        batch = dataclasses.replace(batch, microbatches=microbatches)
        for update in range(2):
            record_update(
                parts, config, batch, step=STEP, update=update, progress=0.25, groups=groups, verdict=verdict,
                region_means=weighting.state_dict()["mean"],
            )  # fmt: skip
            parts.policy.update(batch, RestPolicyLoss(config.loss))
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    models = {
        "dense": str(build_tiny_model(folder / "dense", layers=LAYERS)),
        "experts": str(build_tiny_model(folder / "experts", arch="qwen3_moe", tied=False)),
    }
    run_distributed(record, 2, models, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_term_agrees_with_float64(name: str, recorded: Path) -> None:
    for update in range(2):
        bundle = read_bundle(bundle_path(recorded / name, STEP, update))
        terms = {term.name: term for term in compare(bundle, compute(bundle))}
        assert [str(term) for term in terms.values() if not term.is_right] == []
        gradients = [term for key, term in terms.items() if key.startswith("gradient ")]
        assert len(gradients) == len(bundle.weights)
        assert max(term.difference for term in gradients) < 1e-4
        assert terms["log_probs"].difference < 1e-5
        assert ("old_log_probs" in terms) == (update == 0)
        ratio = bundle.seen["ratio"][bundle.batch["loss_mask"]]
        assert bool((ratio == 1.0).all()) == (update == 0)


def changed(bundle: ReplayBundle, part: str, name: str) -> ReplayBundle:
    """One value of one term moved, at the loss token in the middle."""
    tensors = dict(getattr(bundle, part))
    value = tensors[name].clone()
    if part in ("batch", "seen"):
        index = int(bundle.batch["loss_mask"].nonzero()[5, 0])
        value[index] = (value[index] + 1) % 100 if name == "labels" else value[index] + 0.25
        if name == "region_ids":  # another weight than any other region's
            is_name = int(tensors[name][index]) == TokenRegion.TOOL_NAME
            value[index] = int(TokenRegion.FORMAT if is_name else TokenRegion.TOOL_NAME)
    else:
        value.view(-1)[::2] += 0.25
    return dataclasses.replace(bundle, **{part: tensors | {name: value}})


CHANGES = [
    ("batch", "labels", "labels"),
    ("batch", "sequence_lengths", "sequence_lengths"),
    ("batch", "advantages", "advantages"),
    ("step", "rewards", "advantages"),
    ("batch", "token_weights", "token_weights"),
    ("batch", "region_ids", "token_weights"),
    ("weights", "model.layers.1.mlp.up_proj.weight", "log_probs"),
    ("seen", "log_probs", "log_probs"),
    ("seen", "entropy", "entropy"),
    ("batch", "old_log_probs", "old_log_probs"),
    ("seen", "ratio", "ratio"),
    ("seen", "policy_loss", "policy_loss"),
    ("seen", "token_losses", "token_losses"),
    ("gradient", "model.layers.1.mlp.up_proj.weight", "gradient model.layers.1.mlp.up_proj.weight"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "name", "named"), CHANGES, ids=[f"{part}.{name}" for part, name, _ in CHANGES])
def test_a_changed_term_is_named(
    part: str, name: str, named: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = read_bundle(bundle_path(recorded / "dp2", STEP, 0))
    path = write_bundle(tmp_path / "changed.safetensors", changed(bundle, part, name))
    assert main([str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["first_wrong"] == named
    if named == "ratio":
        assert main([str(path)]) == 1
        out = capsys.readouterr().out
        assert "DIFFERS: ratio is the first" in out, out
        assert "! ratio" in out


@pytest.mark.extended
def test_a_loss_and_a_configuration_that_are_not_the_runs(recorded: Path) -> None:
    bundle = read_bundle(bundle_path(recorded / "dp2", STEP, 1))

    def first_wrong(**values: Any) -> str:
        other = dataclasses.replace(bundle, facts=dataclasses.replace(bundle.facts, **values))
        return next(term.name for term in compare(other, compute(other)) if not term.is_right)

    assert first_wrong(loss_sum=bundle.facts.loss_sum + 1.0) == "loss_sum"
    assert first_wrong(num_tokens=bundle.facts.num_tokens + 1.0) == "num_tokens"
    assert first_wrong(loss=dataclasses.replace(bundle.facts.loss, clip_high=0.2)) == "policy_loss"
    assert first_wrong(weighting=dataclasses.replace(bundle.facts.weighting, gamma_name=1.3)) == "token_weights"
    assert first_wrong(temperature=1.1) == "log_probs"


@pytest.mark.extended
def test_files_that_are_no_bundles(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = bundle_path(recorded / "dp2", STEP, 0).read_bytes()
    path, chance = tmp_path / "bad.safetensors", random.Random(1)
    header = int.from_bytes(good[:8], "little")
    for case in range(60):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(8 + header)] = chance.randrange(256)
        if case % 3 == 0:
            data = data[: chance.randrange(len(data))]
        path.write_bytes(data)
        try:
            read_bundle(path)
        except BundleError as error:
            assert str(path) in str(error)
    for content in (b"", b"{}", good[:100], b"\xff" * 64):
        path.write_bytes(content)
        assert main([str(path)]) == 2
    path.unlink()
    assert main([str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and all(line.startswith("error: ") for line in said)


def test_steps_that_are_recorded() -> None:
    from megatron_rest.config import load
    from megatron_rest.trainer.replay import is_recorded

    assert not any(is_recorded(step, load()) for step in range(1, 10))
    config = load(overrides=["trainer.replay_every=3"])
    assert [step for step in range(1, 10) if is_recorded(step, config)] == [3, 6, 9]
