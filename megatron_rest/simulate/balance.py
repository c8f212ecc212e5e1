"""How much of the GPUs' time computes: the trainer's packing on drawn lengths, through Megatron's pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from megatron_rest.config import RestConfig
from megatron_rest.data.alignment import packing_alignment, round_up
from megatron_rest.data.packing import RowCost
from megatron_rest.model_map import ModelShape
from megatron_rest.passes import microbatches_multiple, shares_prompts
from megatron_rest.planner.lengths import DrawnSample, Lengths
from megatron_rest.planner.work import ReplicaTime, deal_as_configured

__all__ = ["RLLA_PROMPTS", "Balance", "long_tailed", "simulate_balance"]

RLLA_PROMPTS = (
    665,
    711,
    747,
    767,
    802,
    815,
    860,
    889,
    942,
    976,
    1002,
    1050,
    1106,
    1158,
    1208,
    1281,
    1369,
    1463,
    1564,
    1731,
    1990,
)
"""Quantiles (every twentieth) of the prompts of ResT's public rlla_4k rows, in pieces of about four characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """Means over the drawn updates."""

    share: float  # of the time of all GPUs that computes what the update needs; padding, bubbles and waiting are not
    share_with_head: float  # the same with the output layer where it is, in the last stage
    microbatches: int  # of a replica
    empty: float  # share of the microbatches
    padding: float  # share of the rows that fill microbatches up to one length
    imbalance: float  # slowest replica's work over the mean
    possible: float  # the share that no dealing of these lengths exceeds (1 without a pipeline)


def long_tailed(*, median: float, most: int, prompts: Sequence[int] = RLLA_PROMPTS, spread: float = 0.7) -> Lengths:
    """Responses that are log-normal about ``median``, cut at ``most``; prompts spread as ``prompts``' quantiles."""
    quantiles = (np.arange(200) + 0.5) / 200
    # The normal distribution's quantiles without scipy: of a large fixed sample.
    normal = np.quantile(np.random.default_rng(0).standard_normal(200_000), quantiles)
    responses = np.clip(median * np.exp(spread * normal), 30, most).round().astype(np.int64)
    spread_out = np.interp(quantiles, np.linspace(0, 1, len(prompts)), prompts).round().astype(np.int64)
    return Lengths(
        prompts=spread_out,
        responses=responses,
        prompt_source="quantiles of rlla_4k",
        response_source=f"log-normal about {median:g}, at most {most}",
    )


def simulate_balance(
    config: RestConfig,
    shape: ModelShape,
    lengths: Lengths,
    *,
    world_size: int,
    draws: int = 3,
    is_sharing: bool | None = None,
) -> Balance:
    """Of one update; ``is_sharing`` None: prompts are shared as on a GPU."""
    if is_sharing is None:
        is_sharing = shares_prompts(config, has_transformer_engine=True)
    cost = RowCost.of_shape(shape)
    group_size = config.rollout.rollouts_per_prompt
    size = config.data.prompts_per_step * group_size // config.optimizer.updates_per_step
    seen = []
    for seed in range(draws):
        samples: list[DrawnSample] = lengths.draw(size, group_size=group_size, seed=seed)
        replicas, report = deal_as_configured(config, world_size, samples, cost, is_sharing=is_sharing)
        useful = sum(part.cost for bins in replicas for parts in bins for part in parts)
        even, real = (
            [ReplicaTime.of(config, bins, samples, cost, has_head=has_head) for bins in replicas]
            for has_head in (False, True)
        )
        mean = useful / len(replicas)
        share, with_head = (mean / max(replica.time for replica in times) for times in (even, real))
        padding = sum(replica.padding_rows for replica in even) / sum(replica.rows for replica in even)
        empty = report.num_empty / (report.num_microbatches * len(replicas))
        rows = sum(part.rows for bins in replicas for parts in bins for part in parts)
        longest = max(part.rows for bins in replicas for parts in bins for part in parts)
        possible = mean / _least_time(config, mean, rows / len(replicas), longest)
        seen.append((share, with_head, report.num_microbatches, empty, padding, report.imbalance, possible))
    return Balance(
        share=fmean(s[0] for s in seen),
        share_with_head=fmean(s[1] for s in seen),
        microbatches=seen[0][2],
        empty=fmean(s[3] for s in seen),
        padding=fmean(s[4] for s in seen),
        imbalance=fmean(s[5] for s in seen),
        possible=fmean(s[6] for s in seen),
    )


def _least_time(config: RestConfig, work: float, rows: float, longest: int) -> float:
    """Of a replica with ``work`` in ``rows``, however they are dealt out, in units of one row through all layers.

    ``m`` microbatches of ``L`` rows hold them all; ``L`` is a multiple of what FP8 and sequence parallelism want and no
    less than the longest sample, ``m`` one of the stages where they are interleaved.  What fills the ``m L`` rows up is
    computed, too, and filling and draining takes ``(p - 1) / v`` of one microbatch, which is at least its rows.
    """
    p = config.parallel
    if p.pipeline_parallel == 1:
        return work
    alignment, multiple = packing_alignment(config.precision.recipe, p), microbatches_multiple(p)
    most = round_up(config.trainer.max_tokens_per_microbatch, alignment.total)
    idle = (p.pipeline_parallel - 1) / p.virtual_pipeline
    times = []
    for length in range(round_up(longest, alignment.total), most + 1, alignment.total):
        count = round_up(max(math.ceil(rows / length), 1), multiple)
        times.append(work + count * length - rows + idle * length)
    return min(times)
