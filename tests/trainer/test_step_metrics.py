"""Numbers of a step by region, against plain Python over single tokens; the split over ranks changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rest.config import LossConfig
from megatron_rest.data.batching import make_microbatch
from megatron_rest.mcore.policy import Scores
from megatron_rest.trainer.step_metrics import REGION_NAMES, TokenAges, rollout_metrics, token_metrics
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason, TrainSample
from tests.helpers.distributed import run_distributed

CAP = 1.2


def samples(rng: np.random.Generator) -> list[TrainSample]:
    """Five sequences; the second one has tool outputs between its turns; some loss tokens belong to no region."""
    made = []
    for i, n in enumerate((6, 15, 9, 4, 12)):
        mask = np.arange(n) >= 3
        if i == 1:
            mask[6:9] = False
        made.append(
            TrainSample(
                token_ids=rng.integers(0, 99, n).astype(np.int32),
                loss_mask=mask,
                region_ids=np.where(mask, rng.integers(0, 6, n), 0).astype(np.int8),
                rollout_log_probs=np.where(mask, -rng.random(n), 0).astype(np.float32),
                advantage=1.0,
                sequence_id=i,
            )
        )
    return made


def _rollout(sample: TrainSample) -> Rollout:
    """Its first two tokens are of version 3, the others of 4 (none is of 5)."""
    return Rollout(
        prompt_id="p",
        token_ids=sample.token_ids[3:],
        log_probs=sample.rollout_log_probs[3:],
        loss_mask=sample.loss_mask[3:],
        stop_reason=StopReason.EOS,
        policy_version=4,
        versions=np.where(np.arange(len(sample.token_ids) - 3) < 2, 3, 4),
    )


def on_ranks(rank: int, world_size: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    everything = samples(rng)
    gaps = [rng.normal(scale=0.3, size=len(s.token_ids)).astype(np.float32) for s in everything]
    results = []
    for level in ("token", "sequence"):
        microbatches, scores = [], []
        for part in ([0, 1], [2], [3, 4])[rank::world_size]:
            microbatch = make_microbatch([everything[i] for i in part])
            gap = torch.zeros(len(microbatch.token_ids))
            for t in torch.nonzero(microbatch.loss_mask)[:, 0].tolist():
                gap[t] = float(gaps[int(microbatch.sequence_ids[t])][int(microbatch.position_ids[t]) + 1])
            microbatches.append(microbatch)
            entropy = torch.full_like(gap, 0.5)
            scores.append(Scores(log_probs=microbatch.rollout_log_probs + gap, entropy=entropy))
            microbatches[-1] = replace(microbatch, ref_log_probs=microbatch.rollout_log_probs)
        config = LossConfig(tis_cap=CAP, tis_level=level, kl_coef=0.1)
        rollouts = [_rollout(s) for s in everything]
        ages = TokenAges.of(everything, rollouts, step=6, oldest=2)
        results.append(token_metrics(microbatches, scores, config, dp_group=dist.group.WORLD, ages=ages))
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_mismatch_and_truncation_by_region(world_size: int) -> None:
    rng = np.random.default_rng(0)
    everything = samples(rng)
    gaps = [rng.normal(scale=0.3, size=len(s.token_ids)).astype(np.float32) for s in everything]
    tokens = [
        (
            int(s.region_ids[t]),
            float(gap[t]),
            float(gap[s.loss_mask].sum()),
            t == np.flatnonzero(s.loss_mask)[0],
            int(t),
        )
        for s, gap in zip(everything, gaps, strict=True)
        for t in np.flatnonzero(s.loss_mask)
    ]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    for found in run_distributed(on_ranks, world_size):
        for level, metrics in zip(("token", "sequence"), found, strict=True):
            ratio = 1 if level == "token" else 2
            assert metrics["mismatch/abs_log_prob_mean"] == pytest.approx(mean([abs(t[1]) for t in tokens]), rel=1e-4)
            assert metrics["mismatch/abs_log_prob_max"] == pytest.approx(max(abs(t[1]) for t in tokens), rel=1e-4)
            first = [abs(t[1]) for t in tokens if t[3]]
            assert len(first) == 5 and metrics["mismatch/first_token"] == pytest.approx(mean(first), rel=1e-4)
            truncated = [float(math.exp(t[ratio]) >= CAP) for t in tokens]
            assert metrics["tis_clipped/all"] == pytest.approx(mean(truncated)) and 0 < mean(truncated) < 1
            for region, name in REGION_NAMES.items():
                mine = [t for t in tokens if t[0] == region]
                assert metrics[f"mismatch/{name}"] == pytest.approx(mean([abs(t[1]) for t in mine]), rel=1e-4)
                share = mean([float(math.exp(t[ratio]) >= CAP) for t in mine])
                assert metrics[f"tis_clipped/{name}"] == pytest.approx(share)
                kl = mean([math.expm1(-t[1]) + t[1] for t in mine])
                assert metrics[f"kl_ref/{name}"] == pytest.approx(kl, rel=1e-3)
            old = [t for t in tokens if t[4] < 5]
            young = [t for t in tokens if t[4] >= 5]
            assert metrics["tokens/age_2"] == pytest.approx(len(old) / len(tokens)) and metrics["tokens/age_0"] == 0
            assert metrics["mismatch/age_2"] == pytest.approx(mean([abs(t[1]) for t in old]), rel=1e-4)
            assert metrics["mismatch/age_1"] == pytest.approx(mean([abs(t[1]) for t in young]), rel=1e-4)
            share = mean([float(math.exp(t[ratio]) >= CAP) for t in young])
            assert metrics["tis_clipped/age_1"] == pytest.approx(share) and "mismatch/age_0" not in metrics
            assert metrics["kl_ref/all"] == pytest.approx(mean([math.expm1(-t[1]) + t[1] for t in tokens]), rel=1e-3)


def test_how_rollouts_ended_and_how_old_they_are() -> None:
    one = Rollout(
        prompt_id="p",
        token_ids=np.zeros(2, np.int32),
        log_probs=np.zeros(2, np.float32),
        loss_mask=np.ones(2, bool),
        stop_reason=StopReason.EOS,
        policy_version=4,
    )
    prompt = PromptSample(prompt_id="p", token_ids=np.zeros(1, np.int32), ground_truth="")
    rollouts = (one, replace(one, versions=np.array([3, 4]), stop_reason=StopReason.TOOL_TIMEOUT))
    metrics = rollout_metrics([RolloutGroup(prompt=prompt, rollouts=rollouts)], step=5, num_restarts=2)
    assert metrics["rollout/count"] == 2 and metrics["rollout/restarts"] == 2
    assert metrics["rollout/staleness"] == 0.25 and metrics["rollout/staleness_max"] == 1, "by token"
    assert metrics["rollout/continued"] == 0.5
    assert metrics["stop/eos"] == metrics["stop/tool_timeout"] == 0.5 and metrics["stop/length"] == 0
    assert "stop/cut" not in metrics
    with pytest.raises(ValueError, match=r"version 4, and its last token is of policy_version 3"):
        replace(one, policy_version=3)
