"""How much of the GPUs' time computes: the trainer's packing on drawn lengths, through Megatron's pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from megatron_rest.config import RestConfig
from megatron_rest.data.alignment import packing_alignment, round_up
from megatron_rest.data.packing import Part, RowCost
from megatron_rest.model_map import ModelShape
from megatron_rest.passes import shares_prompts
from megatron_rest.planner.lengths import DrawnSample, Lengths
from megatron_rest.planner.work import deal_as_configured
from megatron_rest.simulate.pipeline import pipeline_seconds

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
    microbatches: int  # of a replica
    empty: float  # share of the microbatches
    padding: float  # share of the rows that fill microbatches up to one length
    imbalance: float  # slowest replica's work over the mean


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
    p = config.parallel
    if is_sharing is None:
        is_sharing = shares_prompts(config, has_transformer_engine=True)
    alignment = packing_alignment(config.precision.recipe, p)
    cost = RowCost.of_shape(shape)
    group_size = config.rollout.rollouts_per_prompt
    size = config.data.prompts_per_step * group_size // config.optimizer.updates_per_step
    seen = []
    for seed in range(draws):
        samples: list[DrawnSample] = lengths.draw(size, group_size=group_size, seed=seed)
        replicas, report = deal_as_configured(config, world_size, samples, cost, is_sharing=is_sharing)
        useful = sum(part.cost for bins in replicas for parts in bins for part in parts)
        times = [_replica(config, bins, cost, alignment.total) for bins in replicas]
        stages = p.pipeline_parallel
        # Three passes of everything, spread over all stages of all replicas.
        share = 3 * useful / (len(replicas) * stages) / max(seconds for seconds, _, _ in times)
        rows = sum(r for _, r, _ in times)
        padding = sum(filled for _, _, filled in times) / rows
        seen.append((share, report.num_microbatches, report.num_empty, padding, report.imbalance, len(replicas)))
    return Balance(
        share=fmean(s[0] for s in seen),
        microbatches=seen[0][1],
        empty=fmean(s[2] / (s[1] * s[5]) for s in seen),
        padding=fmean(s[3] for s in seen),
        imbalance=fmean(s[4] for s in seen),
    )


def _replica(
    config: RestConfig, bins: Sequence[Sequence[Part]], cost: RowCost, multiple: int
) -> tuple[float, int, int]:
    """Seconds (in units of a row's forward pass) of an update, rows, and how many of them fill microbatches up."""
    p = config.parallel
    rows = [sum(part.rows for part in parts) for parts in bins]
    # In a pipeline all microbatches of an update have one length, so that no shapes are exchanged.
    longest = max(rows) if p.pipeline_parallel > 1 else 0
    wanted = [round_up(max(longest, n, 1), multiple) for n in rows]
    forward = [sum(part.cost for part in b) + cost(w - n) for b, n, w in zip(bins, rows, wanted, strict=True)]
    if p.pipeline_parallel == 1:
        return 3 * sum(forward), sum(wanted), sum(wanted) - sum(rows)
    seconds = pipeline_seconds(forward, stages=p.pipeline_parallel, chunks=p.virtual_pipeline)
    return seconds, sum(wanted), sum(wanted) - sum(rows)
