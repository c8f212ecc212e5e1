"""How far FP8 moves the policy's log-probs: measured at the start of a run, refused above a configured bound.

PPO's clip range is a few tenths of a nat; a recipe that moves the log-probs of one region by as much trains on noise
there, whatever the mean over all tokens says.  So the same weights score the same sequences with and without FP8
products, and |difference| is reported region by region.

The sequences are prompts with their reference answers: what the policy should say, with every region in it, before
anything has been sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.config import ConfigError
from megatron_rest.data.prompts import PromptDataset
from megatron_rest.help_topics import Topic, see
from megatron_rest.trainer.judge import Judge
from megatron_rest.trainer.step_metrics import REGION_NAMES
from megatron_rest.types import MicroBatch, Rollout, RolloutGroup, StopReason, TrainSample

__all__ = ["MismatchCertificate", "PrecisionMismatchError", "RegionMismatch", "canary_samples", "measure_mismatch"]


class PrecisionMismatchError(ConfigError):
    """FP8 moves the log-probs of a region further than ``precision.max_mismatch`` allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionMismatch:
    """|log-prob - reference log-prob| over the tokens of one region, nats."""

    mean: float
    largest: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchCertificate:
    """The measurement, and the verdict on it."""

    name: str  # what was compared, for people
    regions: Mapping[str, RegionMismatch]  # those that have tokens

    def lines(self) -> list[str]:
        """A table for people."""
        rows = [f"  {name:10s} {r.num_tokens:8d} {r.mean:10.5f} {r.largest:10.5f}" for name, r in self.regions.items()]
        return [
            f"precision certificate, {self.name}: |log-prob difference| in nats",
            f"  {'region':10s} {'tokens':>8s} {'mean':>10s} {'largest':>10s}",
            *rows,
        ]

    def check(self, max_mismatch: float) -> None:
        """Raises :class:`PrecisionMismatchError` naming the worst region if its mean is above."""
        name, worst = max(self.regions.items(), key=lambda item: item[1].mean)
        if not worst.mean <= max_mismatch:
            raise PrecisionMismatchError(
                f"{self.name}: log-probs of region {name} differ by {worst.mean:.4g} nats on average "
                f"({worst.num_tokens} tokens, largest {worst.largest:.4g}), more than "
                f"precision.max_mismatch={max_mismatch:g}. Choose a finer recipe (mxfp8, blockwise, tensorwise, "
                "delayed is the order), keep layers in BF16 (precision.bf16_layers_start, "
                f"precision.bf16_layers_end) or, knowing what it costs, raise the bound{see(Topic.FP8_CERTIFICATE)}"
            )


def measure_mismatch(
    name: str,
    microbatches: Sequence[MicroBatch],
    log_probs: Sequence[Tensor],
    reference: Sequence[Tensor],
    *,
    group: dist.ProcessGroup | None,
) -> MismatchCertificate:
    """Compare two scorings ``[T]`` a microbatch of the same tokens, over the tokens with loss.

    ``group`` holds the ranks with other tokens; None means this process alone.  Collectives: one SUM and one MAX
    all-reduce of float64 over it.  Raises ConfigError if no token has loss on any rank.
    """
    sums = torch.zeros(len(REGION_NAMES), 2, dtype=torch.float64)  # sum of |difference|, tokens
    largest = torch.zeros(len(REGION_NAMES), dtype=torch.float64)
    for microbatch, actual, expected in zip(microbatches, log_probs, reference, strict=True):
        mask = microbatch.loss_mask.cpu()
        gap = (actual.cpu().double() - expected.cpu().double()).abs()[mask]
        gap = torch.nan_to_num(gap, nan=torch.inf)  # above every bound
        regions = microbatch.region_ids.cpu()[mask]
        for row, region in enumerate(REGION_NAMES):
            here = gap[regions == int(region)]
            sums[row] += torch.stack([here.sum(), torch.tensor(float(len(here)), dtype=torch.float64)])
            largest[row] = torch.cat([largest[row : row + 1], here]).max()
    if group is not None:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    regions_with_tokens = {
        region: RegionMismatch(mean=total / count, largest=worst, num_tokens=int(count))
        for region, (total, count), worst in zip(REGION_NAMES.values(), sums.tolist(), largest.tolist(), strict=True)
        if count
    }
    if not regions_with_tokens:
        raise ConfigError("no token of the canary batch carries a loss: nothing can be certified")
    return MismatchCertificate(name=name, regions=regions_with_tokens)


def canary_samples(prompts: PromptDataset, judge: Judge, *, count: int, max_tokens: int) -> list[TrainSample]:
    """The first ``count`` prompts of at most ``max_tokens`` tokens with their reference answers, regions labelled."""
    samples: list[TrainSample] = []
    for row in range(len(prompts)):
        prompt, answer = prompts[row], prompts.reference_token_ids(row)
        if not len(answer) or len(prompt.token_ids) + len(answer) > max_tokens:
            continue
        rollout = Rollout(
            prompt_id=prompt.prompt_id,
            token_ids=answer,
            log_probs=np.zeros(len(answer), np.float32),
            loss_mask=np.ones(len(answer), bool),
            stop_reason=StopReason.EOS,
            policy_version=0,
        )
        group = RolloutGroup(prompt=prompt, rollouts=(rollout,))
        samples.append(judge.sample(group, rollout, advantage=0.0, sequence_id=len(samples)))
        if len(samples) == count:
            break
    if not samples:
        raise ConfigError(
            f"no prompt with its reference answer fits into {max_tokens} tokens: nothing can be certified"
        )
    return samples
