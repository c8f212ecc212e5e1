"""Numbers of one step under their names in ``metrics.jsonl``.  Sums travel, one division happens here."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
import torch.distributed as dist

from megatron_rest.mcore.policy import Scores, UpdateReport
from megatron_rest.trainer.judge import Verdict
from megatron_rest.trainer.metrics import SumCount
from megatron_rest.types import MicroBatch, TokenRegion

__all__ = ["REGION_NAMES", "reward_metrics", "token_metrics", "update_metrics"]

REGION_NAMES = {
    TokenRegion.FORMAT: "format",
    TokenRegion.TOOL_NAME: "name",
    TokenRegion.TOOL_ARGS: "args",
    TokenRegion.THINK: "think",
    TokenRegion.RESPONSE: "response",
}

# The loss's own names, as metrics.jsonl has them.
_LOSS_NAMES = {
    "approx_kl": "kl_old_new",
    "clip_fraction_low": "clip_low",
    "clip_fraction_high": "clip_high",
    "policy_loss": "policy_token_mean",
}


def reward_metrics(verdict: Verdict, *, num_groups: int) -> dict[str, float]:
    """Rewards, lengths and advantages; the same on every rank."""
    rewards = verdict.rewards
    return {
        "reward/total": fmean(r.total for r in rewards),
        "reward/format": fmean(r.format for r in rewards),
        "reward/correctness": fmean(r.correctness for r in rewards),
        "reward/accuracy": fmean(r.accuracy for r in rewards),
        "reward/format_valid": fmean(float(r.is_format_valid) for r in rewards),
        "reward/static": fmean(verdict.static_rewards),
        "response/length": fmean(float(s.loss_mask.sum()) for s in verdict.samples),
        "response/truncated": verdict.num_truncated / len(rewards),
        "advantage/zero_groups": verdict.num_zero_groups / num_groups,
    }


def token_metrics(
    microbatches: Sequence[MicroBatch], scores: Sequence[Scores], *, dp_group: dist.ProcessGroup
) -> dict[str, float]:
    """Unweighted entropy, weight mass and token share by region, and the mismatch of rollout and training log-probs.

    ``microbatches`` carry ``token_weights``.  Collectives: one SUM and one MAX all-reduce over the data-parallel group.
    """
    sums = torch.zeros(len(REGION_NAMES), 3, dtype=torch.float64)  # entropy, weight, tokens
    total_gap, worst_gap = torch.zeros(2, 1, dtype=torch.float64)  # of |rollout - training|
    for microbatch, score in zip(microbatches, scores, strict=True):
        mask = microbatch.loss_mask
        regions, entropy = microbatch.region_ids[mask], score.entropy.cpu()[mask].double()
        weights = (
            torch.ones_like(entropy) if microbatch.token_weights is None else microbatch.token_weights[mask].double()
        )
        table = torch.stack([entropy, weights, torch.ones_like(entropy)], dim=1)
        for row, region in enumerate(REGION_NAMES):
            sums[row] += table[regions == int(region)].sum(0)
        gap = (microbatch.rollout_log_probs - score.log_probs.cpu())[mask].abs().double()
        if len(gap):
            total_gap += gap.sum()
            worst_gap.clamp_(min=gap.max())
    dist.all_reduce(sums, group=dp_group)
    dist.all_reduce(total_gap, group=dp_group)
    dist.all_reduce(worst_gap, op=dist.ReduceOp.MAX, group=dp_group)
    metrics = SumCount()
    mass, tokens = float(sums[:, 1].sum()), float(sums[:, 2].sum())
    metrics.add("entropy/all", sums[:, 0].sum(), tokens)
    metrics.add("mismatch/abs_log_prob_mean", total_gap, tokens)
    for (entropy_sum, weight_sum, count), name in zip(sums.tolist(), REGION_NAMES.values(), strict=True):
        metrics.add(f"entropy/{name}", entropy_sum, count)
        metrics.add(f"weight_mass/{name}", weight_sum, mass)
        metrics.add(f"tokens/{name}", count, tokens)
    return {**metrics.means(), "mismatch/abs_log_prob_max": float(worst_gap)}


def update_metrics(reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Loss and optimiser of the step's updates: sums added up, norms averaged."""
    sums = SumCount()
    for report in reports:
        sums.merge(report.metrics)
    return {
        **{f"loss/{_LOSS_NAMES.get(name, name)}": value for name, value in sums.means().items()},
        "loss/policy": fmean(r.loss for r in reports),
        "optimizer/grad_norm": fmean(r.grad_norm for r in reports),
        "optimizer/lr": reports[-1].lr,
        "optimizer/skipped": float(sum(r.is_skipped for r in reports)),
    }
