"""What scoring and update of one step compute, counted on drawn lengths that are packed as the trainer packs them.

Operations are those of the GPU that has most to do, with its idle time counted as if it computed: seconds are these
over a rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from megatron_rest.config import RestConfig
from megatron_rest.credit_traits import traits_of
from megatron_rest.data.alignment import packing_alignment, round_up
from megatron_rest.data.packing import Part, RowCost, deal
from megatron_rest.model_map import ModelShape
from megatron_rest.packing_report import PackingReport
from megatron_rest.passes import (
    is_scored,
    keeps_zero_groups,
    least_microbatches,
    microbatches_multiple,
    shares_prompts,
)
from megatron_rest.planner.lengths import DrawnSample, Lengths
from megatron_rest.planner.parameters import total_parameters
from megatron_rest.planner.pipeline import pipeline_seconds

__all__ = ["Assumptions", "ReplicaTime", "StepWork", "deal_as_configured", "extra_draws", "forward_flops", "step_work"]

_DRAWS, _DRAWN = 4, 1024  # updates that are looked at, and sequences of them after which no more are


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What a step leaves out; a copy with one of them changed says what that one is worth."""

    shares_prompts: bool
    zero_groups: float = 0.0  # share of groups whose rewards are all alike, before prompts are drawn again

    @classmethod
    def of(cls, config: RestConfig, *, is_cpu: bool, zero_groups: float = 0.0) -> Assumptions:
        """On a GPU Transformer Engine is taken to be there."""
        return cls(shares_prompts=shares_prompts(config, has_transformer_engine=not is_cpu), zero_groups=zero_groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """Scoring and updates of one step; shares and the report are means over the updates that were looked at."""

    forward: float  # operations of one update's forward pass on the busiest GPU, idle time and padding included
    forward_flops: float  # of it on all GPUs, nothing idle, padding of sequences alone
    update_passes: float  # forward passes that an update with its backward pass costs
    score_passes: float  # of all updates of a step together, the reference policy's included
    num_updates: int
    num_scored: int
    bubble: float  # share of the busiest replica's time in which its stages wait for each other
    padding: float  # share in which it computes rows that fill microbatches up to one length
    left_out: float  # share of the sequences that are not trained
    packing: PackingReport

    @property
    def score(self) -> float:
        """Operations of a step's scoring on the busiest GPU."""
        return self.score_passes * self.forward

    @property
    def update(self) -> float:
        """Operations of a step's updates on the busiest GPU."""
        return self.num_updates * self.update_passes * self.forward

    @property
    def score_flops(self) -> float:
        """Of all GPUs, nothing idle."""
        return self.score_passes * self.forward_flops

    @property
    def update_flops(self) -> float:
        """Of all GPUs, nothing idle."""
        return self.num_updates * self.update_passes * self.forward_flops

    def with_all_scored(self) -> StepWork:
        """As if every update were scored."""
        more = (self.num_updates - self.num_scored) * (self.score_passes / self.num_scored if self.num_scored else 1.0)
        return replace(self, score_passes=self.score_passes + more, num_scored=self.num_updates)


def forward_flops(shape: ModelShape, *, tokens: float, mean_context: float, head: bool = True) -> float:
    """Of one forward pass: 2 per weight and token that a token meets, and 4 q per token and token it attends to.

    The input embedding is a look-up; normalisation, rotation and SwiGLU's elementwise part are left out (below 1 %).
    """
    embedding = shape.vocab_size * shape.hidden_size
    matrices = total_parameters(shape, active_only=True, matrices_only=True)
    matrices -= embedding if shape.tied_embeddings else 2 * embedding
    attention = 4 * shape.num_layers * shape.num_attention_heads * shape.head_dim * mean_context
    return tokens * (2 * (matrices + (embedding if head else 0)) + attention)


def step_work(
    config: RestConfig, shape: ModelShape, *, world_size: int, lengths: Lengths, assumed: Assumptions
) -> StepWork:
    """Of a step whose lengths are drawn from ``lengths`` with a fixed seed."""
    num_updates, group_size = config.optimizer.updates_per_step, config.rollout.rollouts_per_prompt
    size = config.data.prompts_per_step * group_size // num_updates
    keeps_all = keeps_zero_groups(config)
    left_out = 0.0 if keeps_all else _zero_share(config, assumed.zero_groups)
    trained = max(round(size * (1 - left_out)), 1)
    cost = RowCost.of_shape(shape)
    draws = [
        _pack(config, world_size, lengths.draw(trained, group_size=group_size, seed=seed), cost, assumed.shares_prompts)
        for seed in range(min(_DRAWS, max(_DRAWN // size, 1)))
    ]
    scored = sum(is_scored(config, number) for number in range(num_updates))
    is_measured = traits_of(config.weighting.source).is_of_all
    passes = scored / (1 - left_out) if is_measured else float(scored)  # statistics are of all samples
    again = 0.0 if config.parallel.recompute == "none" else fmean(d.layers for d in draws)
    again *= _mlp_share(shape) if config.parallel.recompute == "mlp" else 1.0
    unit = forward_flops(shape, tokens=1, mean_context=0, head=False)
    p = config.parallel
    reports = [d.report for d in draws]
    return StepWork(
        forward=unit * fmean(d.time for d in draws) / p.replica_size,
        forward_flops=unit * fmean(d.useful for d in draws),
        update_passes=3 + again,
        score_passes=passes + (num_updates if config.loss.kl_coef else 0),
        num_updates=num_updates,
        num_scored=scored,
        bubble=fmean(d.bubble / d.time for d in draws),
        padding=fmean(d.padding / d.time for d in draws),
        left_out=left_out,
        packing=replace(
            reports[0],
            rows=round(fmean(r.rows for r in reports)),
            plain_rows=round(fmean(r.plain_rows for r in reports)),
            num_empty=max(r.num_empty for r in reports),
            prompt_copies=fmean(r.prompt_copies for r in reports),
            imbalance=fmean(r.imbalance for r in reports),
        ),
    )


def _zero_share(config: RestConfig, share: float) -> float:
    """Of the groups that reach training, where ``data.resample_zero_groups`` draws again in place of some."""
    return max(1 - (1 + extra_draws(config, share)) * (1 - share), 0.0)


def extra_draws(config: RestConfig, share: float) -> int:
    """Draws beyond the first: each brings ``1 - share`` of the groups that a step wants."""
    draws = 0
    while draws < config.data.resample_zero_groups and (1 + draws) * (1 - share) < 1 - 1e-9:
        draws += 1
    return draws


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packed:
    """One update, in units of one row through all layers."""

    time: float  # of the slowest replica, if its GPUs were one
    bubble: float  # of it
    padding: float  # of it
    useful: float  # of all replicas
    layers: float  # share of the work that is not the output layer's
    report: PackingReport


def deal_as_configured(
    config: RestConfig, world_size: int, samples: Sequence[DrawnSample], cost: RowCost, *, is_sharing: bool
) -> tuple[list[list[list[Part]]], PackingReport]:
    """The microbatches of each replica, and the report, of one update as the trainer would deal it."""
    p = config.parallel
    alignment = packing_alignment(config.precision.recipe, p)
    return deal(
        samples,
        max_rows=round_up(config.trainer.max_tokens_per_microbatch, alignment.sequence),
        dp_size=p.data_parallel(world_size),
        multiple=microbatches_multiple(p),
        min_bins=least_microbatches(p),
        row_multiple=alignment.sequence,
        length_multiple=alignment.total,
        is_sharing=is_sharing,
        cost=cost,
    )


def _pack(
    config: RestConfig, world_size: int, samples: Sequence[DrawnSample], cost: RowCost, is_sharing: bool
) -> _Packed:
    replicas, report = deal_as_configured(config, world_size, samples, cost, is_sharing=is_sharing)
    useful = sum(part.cost for bins in replicas for parts in bins for part in parts)
    head = cost.loss_row * sum(s.num_loss_tokens for s in samples)
    times = [ReplicaTime.of(config, bins, samples, cost) for bins in replicas]
    slowest = max(times, key=lambda t: t.time)
    return _Packed(
        time=slowest.time,
        bubble=slowest.time - slowest.busy,
        padding=slowest.padding,
        useful=useful,
        layers=1 - head / useful,
        report=report,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaTime:
    """A forward pass of one replica's share of an update, in units of one row through all layers.

    ``time`` is a third of what forward and backward passes take in a pipeline, whose order they share: the first have
    no order of their own in training.
    """

    time: float  # that all GPUs of the replica are there for, idle or not
    busy: float  # of it, padding included
    padding: float  # of it: rows that fill microbatches up
    rows: int
    padding_rows: int

    @classmethod
    def of(
        cls,
        config: RestConfig,
        bins: Sequence[Sequence[Part]],
        samples: Sequence[DrawnSample],
        cost: RowCost,
        *,
        has_head: bool = True,
    ) -> ReplicaTime:
        """Of ``bins``, with every microbatch of a pipeline as long as the longest.

        ``has_head`` False: the output layer's work lies evenly on all stages, as it does on none.
        """
        p = config.parallel
        multiple = packing_alignment(config.precision.recipe, p).total
        rows = [sum(part.rows for part in parts) for parts in bins]
        is_pipeline = p.pipeline_parallel > 1
        wanted = [round_up(max(max(rows) if is_pipeline else n, 1), multiple) for n in rows]
        padding = [cost(end - n) for n, end in zip(rows, wanted, strict=True)]
        work = [sum(part.cost for part in parts) + extra for parts, extra in zip(bins, padding, strict=True)]
        time = busy = sum(work)
        if is_pipeline:
            answers = [[samples[i] for part in parts for i in part.members] for parts in bins]
            head = [cost.loss_row * has_head * sum(s.num_loss_tokens for s in answer) for answer in answers]
            layers = [all_of_it - of_head for all_of_it, of_head in zip(work, head, strict=True)]
            stages, chunks = p.pipeline_parallel, p.virtual_pipeline
            time = pipeline_seconds(layers, stages=stages, chunks=chunks, head=head) * stages / 3
        return cls(time=time, busy=busy, padding=sum(padding), rows=sum(wanted), padding_rows=sum(wanted) - sum(rows))


def _mlp_share(shape: ModelShape) -> float:
    """Of a forward pass, by weights."""
    width = shape.moe_ffn_hidden_size * shape.num_experts_per_token if shape.num_experts else shape.ffn_hidden_size
    return 3 * shape.hidden_size * width * shape.num_layers / total_parameters(shape, active_only=True)
