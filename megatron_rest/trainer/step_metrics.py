"""Numbers of one step under their names in ``metrics.jsonl``.  Sums travel, one division happens here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist

from megatron_rest.algorithms.importance import truncated_ratios
from megatron_rest.algorithms.kl import kl_estimate
from megatron_rest.config import LossConfig
from megatron_rest.mcore.policy import Scores, UpdateReport
from megatron_rest.trainer.exchange import token_places, token_versions
from megatron_rest.trainer.judge import Verdict
from megatron_rest.trainer.metrics import SumCount
from megatron_rest.types import MicroBatch, Rollout, RolloutGroup, StopReason, TokenRegion, TrainBatch, TrainSample

__all__ = [
    "REGION_NAMES",
    "TokenAges",
    "packing_metrics",
    "reward_metrics",
    "rollout_metrics",
    "token_metrics",
    "update_metrics",
]

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


_CLAIMS = {  # name in the metrics: field of RewardOutput
    "format": "format",
    "correctness": "correctness",
    "accuracy": "accuracy",
    "format_valid": "is_format_valid",
}


def reward_metrics(verdict: Verdict, *, num_groups: int) -> dict[str, float]:
    """Rewards, lengths and advantages; the same on every rank.

    Each number of a reward is the mean over the rollouts that have it, and absent if none has.
    """
    judged = [i for i, is_judged in enumerate(verdict.is_judged) if is_judged] or list(range(len(verdict.rewards)))
    rewards, samples = [verdict.rewards[i] for i in judged], [verdict.samples[i] for i in judged]
    said: dict[str, list[float]] = {}
    for reward in rewards:
        claims = {name: getattr(reward, field) for name, field in _CLAIMS.items()}
        for name, value in {**claims, **reward.parts}.items():
            if value is not None:  # nobody claims what a reward did not say
                said.setdefault(f"reward/{name}", []).append(float(value))
    failed = sum(not reward.is_judged for reward in verdict.rewards)
    return {
        "reward/total": fmean(r.total for r in rewards),
        **{name: fmean(values) for name, values in said.items()},
        **({"reward/failed": failed / len(verdict.rewards)} if failed else {}),
        "reward/static": fmean(verdict.static_rewards[i] for i in judged),
        "reward/not_judged": 1.0 - sum(verdict.is_judged) / len(verdict.is_judged),
        "response/length": fmean(float(s.num_loss_tokens) for s in samples),
        "response/truncated": verdict.num_truncated / len(verdict.rewards),
        "advantage/zero_groups": sum(verdict.is_zero_group) / num_groups,
    }


def rollout_metrics(groups: Sequence[RolloutGroup], *, step: int, num_restarts: int) -> dict[str, float]:
    """How far the sampling policies lag behind, how rollouts ended, engines replaced so far; the same on every rank."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    tokens = [int(np.count_nonzero(rollout.loss_mask)) for rollout in rollouts]
    oldest = [rollout.oldest_version for rollout in rollouts]
    behind = 0  # versions, summed over sampled tokens; a rollout of one version, as nearly all are, needs no table
    for rollout, count, first in zip(rollouts, tokens, oldest, strict=True):
        is_one = first == rollout.policy_version
        behind += (step - 1) * count
        behind -= first * count if is_one else int(rollout.versions[rollout.loss_mask].sum(dtype=np.int64))
    metrics = {
        "rollout/count": float(len(rollouts)),
        "prompt/length": fmean(float(len(g.prompt.token_ids)) for g in groups for _ in g.rollouts),
        "rollout/staleness": behind / max(sum(tokens), 1),
        "rollout/staleness_max": float(step - 1 - min(oldest)),
        "rollout/continued": fmean(
            first < rollout.policy_version for first, rollout in zip(oldest, rollouts, strict=True)
        ),
        "rollout/restarts": float(num_restarts),
    }
    for reason in StopReason:
        if reason is StopReason.CUT:  # it ends no rollout
            continue
        metrics[f"stop/{reason}"] = fmean(rollout.stop_reason is reason for rollout in rollouts)
    return metrics


def packing_metrics(batches: Sequence[TrainBatch], *, num_left_out: int) -> dict[str, float]:
    """How the work of a step's updates was dealt out; the same on every rank."""
    reports = [batch.packing for batch in batches if batch.packing is not None]
    rows, plain = sum(r.rows for r in reports), sum(r.plain_rows for r in reports)
    return {
        "pack/rows": float(rows),
        "pack/rows_saved": 1.0 - rows / plain if plain else 0.0,
        "pack/left_out": float(num_left_out),
        "pack/prompt_copies": fmean(r.prompt_copies for r in reports),
        "pack/imbalance": max(r.imbalance for r in reports),
        "pack/empty_microbatches": float(sum(r.num_empty for r in reports)),
    }


def token_metrics(
    microbatches: Sequence[MicroBatch],
    scores: Sequence[Scores],
    config: LossConfig,
    *,
    dp_group: dist.ProcessGroup,
    ages: TokenAges | None = None,
) -> dict[str, float]:
    """Unweighted entropy, weight mass, token share, mismatch of rollout and training log-probs, share of tokens whose
    importance ratio was truncated, and KL to the reference policy (``loss.kl_estimator``, before the update), by
    region; the mismatch of first tokens besides, and with ``ages`` tokens, mismatch and truncated ratios by age.

    ``microbatches`` carry ``token_weights`` and, under ``loss.kl_coef``, ``ref_log_probs``.  Collectives: one SUM and
    one MAX all-reduce over the data-parallel group.
    """
    # Rows: regions, ages, all loss tokens (more than the regions', where a dialect leaves some out), first tokens.
    num_regions, num_ages = len(REGION_NAMES), 0 if ages is None else ages.oldest + 1
    sums = torch.zeros(num_regions + num_ages + 2, 6, dtype=torch.float64)
    worst_gap = torch.zeros(1, dtype=torch.float64)
    for microbatch, score in zip(microbatches, scores, strict=True):
        mask = microbatch.loss_mask
        table = _token_table(microbatch, score, config)
        regions = microbatch.region_ids[mask]
        for row, region in enumerate(REGION_NAMES):
            sums[row] += table[regions == int(region)].sum(0)
        if ages is not None:
            sums[num_regions:-2].index_add_(0, ages.of_microbatch(microbatch), table)
        sums[-2] += table.sum(0)
        sums[-1] += table[_is_first(microbatch.sequence_ids[mask])].sum(0)
        if len(table):
            worst_gap.clamp_(min=table[:, 3].max())
    dist.all_reduce(sums, group=dp_group)
    dist.all_reduce(worst_gap, op=dist.ReduceOp.MAX, group=dp_group)
    entropy, mass, tokens, gap, clipped, kl = sums[-2].tolist()
    metrics = SumCount()
    metrics.add("entropy/all", entropy, tokens)
    metrics.add("mismatch/abs_log_prob_mean", gap, tokens)
    metrics.add("mismatch/first_token", sums[-1, 3], sums[-1, 2])
    for age, values in enumerate(sums[num_regions:-2].tolist()):
        metrics.add(f"tokens/age_{age}", values[2], tokens)
        metrics.add(f"mismatch/age_{age}", values[3], values[2])
        if config.tis_cap is not None:
            metrics.add(f"tis_clipped/age_{age}", values[4], values[2])
    for values, name in zip(sums[:num_regions].tolist(), REGION_NAMES.values(), strict=True):
        metrics.add(f"entropy/{name}", values[0], values[2])
        metrics.add(f"weight_mass/{name}", values[1], mass)
        metrics.add(f"tokens/{name}", values[2], tokens)
        metrics.add(f"mismatch/{name}", values[3], values[2])
        if config.tis_cap is not None:
            metrics.add(f"tis_clipped/{name}", values[4], values[2])
        if config.kl_coef:
            metrics.add(f"kl_ref/{name}", values[5], values[2])
    if config.kl_coef:
        metrics.add("kl_ref/all", kl, tokens)
    if config.tis_cap is not None:
        metrics.add("tis_clipped/all", clipped, tokens)
    return {**metrics.means(), "mismatch/abs_log_prob_max": float(worst_gap)}


@dataclass(frozen=True, slots=True)
class TokenAges:
    """By how many versions the policy that sampled each token of a step lies behind the one that trains on it."""

    lengths: Sequence[int]  # of all sequences, in the order of their ``sequence_id``
    ages: torch.Tensor  # int64 [sum(lengths)]; no age where nobody sampled
    oldest: int  # largest that there may be

    @classmethod
    def of(cls, samples: Sequence[TrainSample], rollouts: Sequence[Rollout], *, step: int, oldest: int) -> TokenAges:
        """``rollouts`` are those of ``samples``, in the same order."""
        ages = torch.from_numpy(step - 1 - token_versions(samples, rollouts).astype(np.int64))
        return cls([sample.num_tokens for sample in samples], ages, oldest)

    def of_microbatch(self, microbatch: MicroBatch) -> torch.Tensor:
        """int64 [loss tokens]"""
        return self.ages[token_places(self.lengths, microbatch)]


def _token_table(microbatch: MicroBatch, score: Scores, config: LossConfig) -> torch.Tensor:
    """float64 [tokens, 6] of the loss tokens: entropy, weight, 1, |rollout - training|, ratio truncated, KL."""
    mask = microbatch.loss_mask
    entropy = score.entropy.cpu()[mask].double()
    weights = torch.ones_like(entropy) if microbatch.token_weights is None else microbatch.token_weights[mask].double()
    log_ratio = score.log_probs.cpu() - microbatch.rollout_log_probs
    clipped = torch.zeros_like(entropy)
    if config.tis_cap is not None:
        ratios = truncated_ratios(
            log_ratio,
            mask,
            config,
            sequence_ids=microbatch.sequence_ids,
            sequence_lengths=microbatch.sequence_lengths,
        )
        clipped = (ratios[mask] >= config.tis_cap).double()
    kl = torch.zeros_like(entropy)
    if config.kl_coef:
        assert microbatch.ref_log_probs is not None, "the trainer scores the reference where the loss wants it"
        log_probs, reference = score.log_probs.cpu()[mask].double(), microbatch.ref_log_probs[mask].double()
        kl = kl_estimate(log_probs, reference, estimator=config.kl_estimator, max_log_ratio=config.max_log_ratio)
    gap = log_ratio[mask].abs().double()
    return torch.stack([entropy, weights, torch.ones_like(entropy), gap, clipped, kl], dim=1)


def _is_first(sequence_ids: torch.Tensor) -> torch.Tensor:
    """bool: the first loss token of each sequence; sequences lie one after another."""
    return torch.cat([sequence_ids.new_ones(min(len(sequence_ids), 1)), sequence_ids.diff()]) != 0


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
