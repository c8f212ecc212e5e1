"""Leave a bundle: one microbatch, gone through forward and backward once more, with everything the run made of it.

The pass is the update's own (same schedule, head and loss) on the first microbatch of the first replica; the other
replicas join with an empty one, so the gradient that comes out is that microbatch's.  No parameter, random state or
FP8 scale changes: a run that records gives the same numbers as one that does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.config import Fp8Recipe, LossConfig, RestConfig
from megatron_rest.data.batching import make_microbatch
from megatron_rest.mcore.context_parallel import gather
from megatron_rest.mcore.policy import MegatronPolicy
from megatron_rest.replay.bundle import BundleFacts, ReplayBundle, bundle_path, write_bundle
from megatron_rest.trainer.judge import Verdict
from megatron_rest.trainer.setup import PolicyParts, weight_source
from megatron_rest.types import LossInputs, LossOutput, MicroBatch, RolloutGroup, TrainBatch

__all__ = ["is_recorded", "record_update"]


def is_recorded(step: int, config: RestConfig) -> bool:
    """Whether ``step`` leaves bundles."""
    every = config.trainer.replay_every
    return bool(every) and step % every == 0


def record_update(
    parts: PolicyParts,
    config: RestConfig,
    batch: TrainBatch,
    *,
    step: int,
    update: int,
    progress: float,
    groups: Sequence[RolloutGroup],
    verdict: Verdict,
    region_means: list[float | None],
) -> Path | None:
    """Write the bundle of one optimiser update, before it is done; the path on rank 0.

    Collectives: those of an update without the optimiser, one all-gather over CP, one broadcast over PP, and two passes
    of the weights' gather (weights and gradients).  Rank 0 holds both whole.
    """
    context, policy = parts.context, parts.policy
    loss = _Recording(config.loss)
    chosen = replace(batch.microbatches[0], left_out_tokens=0)
    empty = make_microbatch([], alignment=parts.alignment)
    first = chosen if context.dp_rank == 0 else empty
    others = (empty,) * (parts.num_microbatches_multiple - 1)
    metrics, gradients = policy.gradients(TrainBatch(microbatches=(first, *others), totals=batch.totals), loss)
    weights = dict(_on_rank_0(weight_source(parts, bucket_bytes=config.weight_sync.bucket_bytes), context.rank))
    source = weight_source(parts, bucket_bytes=config.weight_sync.bucket_bytes, named_shards=lambda: gradients)
    gradient = dict(_on_rank_0(source, context.rank))
    policy.forget_gradients()
    seen = _gathered(loss, policy, first)
    if context.rank != 0:
        return None
    loss_sum, num_tokens = metrics["loss"]
    oldest = min(rollout.oldest_version for group in groups for rollout in group.rollouts)
    rollout = config.rollout
    facts = BundleFacts(
        step=step,
        update=update,
        progress=progress,
        temperature=rollout.temperature,
        model_dtype=config.model.dtype,
        rollout_dtype=rollout.dtype,
        fp8_recipe=str(config.precision.recipe) if config.precision.recipe is not Fp8Recipe.NONE else "none",
        is_on_policy=oldest == step - 1 and rollout.top_p == 1.0 and rollout.top_k == 0,
        loss_sum=loss_sum,
        num_tokens=num_tokens,
        totals={name: getattr(batch.totals, name) for name in ("num_tokens", "num_sequences", "weight_sum")},
        region_means=region_means,
        loss=config.loss,
        weighting=config.weighting,
        advantage=config.advantage,
        model=json.loads((Path(config.model.path) / "config.json").read_text(encoding="utf-8")),
    )
    bundle = ReplayBundle(
        facts=facts,
        batch=_columns(chosen, seen),
        step={
            "rewards": torch.tensor(verdict.scored_rewards, dtype=torch.float64),
            # What infrastructure ended is compared with nobody.
            "group_ids": torch.tensor(
                [-1 if r.stop_reason.is_infrastructure else i for i, group in enumerate(groups) for r in group.rollouts]
            ),
        },
        weights=weights,
        seen=seen,
        gradient=gradient,
    )
    return write_bundle(bundle_path(config.trainer.run_dir, step, update), bundle)


class _Recording:
    """The policy loss, remembering what the first microbatch was given and gave."""

    def __init__(self, config: LossConfig) -> None:
        self.loss = RestPolicyLoss(config)
        self.terms: dict[str, Tensor] | None = None

    @property
    def is_token_separable(self) -> bool:
        return self.loss.is_token_separable

    def token_losses(self, inputs: LossInputs) -> Tensor:
        return self.loss.token_losses(inputs)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        if self.terms is None:
            self.terms = self.loss.token_terms(inputs)
        return self.loss(inputs)


def _term_names(config: LossConfig) -> list[str]:
    names = ["log_probs", "entropy", "ratio", "policy_loss", "token_losses"]
    return [*names, "tis_weight"] if config.tis_cap is not None else names


def _gathered(loss: _Recording, policy: MegatronPolicy, microbatch: MicroBatch) -> dict[str, Tensor]:
    """Terms of the last stage, whole sequences, on every rank of the pipeline: float32 ``[T]`` each."""
    context, names = policy.context, _term_names(loss.loss.config)
    table = torch.empty(len(names), len(microbatch.token_ids), dtype=torch.float32, device=context.device)
    if context.is_last_stage:
        assert loss.terms is not None, "the schedule calls the loss on the last stage"
        local = torch.stack([loss.terms[name].float() for name in names])
        table.copy_(gather(local, microbatch.cu_seqlens.diff(), context.cp_group))
    if context.pp_size > 1:
        dist.broadcast(table, src=context.last_stage_rank, group=context.pp_group)
    return dict(zip(names, table, strict=True))


def _on_rank_0(stream: Any, rank: int) -> list[tuple[str, Tensor]]:
    """The stream is a collective: every rank goes through all of it."""
    return [(name, tensor.cpu()) for name, tensor in stream if rank == 0]


def _columns(microbatch: MicroBatch, seen: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    assert microbatch.token_weights is not None
    names = ("token_ids", "labels", "position_ids", "cu_seqlens", "loss_mask", "region_ids", "sequence_ids",
             "sequence_lengths", "advantages", "rollout_log_probs", "old_log_probs", "token_weights",
             "parents")  # fmt: skip
    columns = {name: value for name in names if (value := getattr(microbatch, name)) is not None}
    # Where nothing was scored before the update, its own log-probs are the old ones.
    return {"old_log_probs": seen["log_probs"]} | columns
