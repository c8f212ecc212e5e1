"""Changes that make a plan fit, each tried by planning it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rest.config import ConfigError, load
from megatron_rest.planner.plan import Plan

__all__ = ["Change", "changes_that_fit"]

_MOST = 5  # more to choose from is no help


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Overrides, and what becomes of the plan with them."""

    overrides: tuple[str, ...]
    plan: Plan


def changes_that_fit(plan: Plan) -> list[Change]:
    """Single changes first; if none is enough, pairs.  Cheapest step first where a time is known."""
    single = list(_single(plan))
    found = _try(plan, [(one,) for one in single])
    if not found:
        found = _try(plan, [(a, b) for i, a in enumerate(single) for b in single[i + 1 :] if _key(a) != _key(b)])
    return sorted(found, key=lambda change: change.plan.time.total if change.plan.time else 0.0)[:_MOST]


def _single(plan: Plan) -> Iterator[str]:
    c = plan.config
    p = c.parallel
    if not p.distributed_optimizer:
        yield "parallel.distributed_optimizer=true"
    if p.tensor_parallel > 1 and not p.sequence_parallel:
        yield "parallel.sequence_parallel=true"
    for what in ("mlp", "full")[("none", "mlp", "full").index(p.recompute) :]:
        yield f"parallel.recompute={what}"
    if not (c.rollout.replicas or c.trainer.offload or plan.hardware.is_cpu):
        yield "trainer.offload=true"
    longest = c.data.max_prompt_tokens + c.rollout.max_response_tokens
    for divisor in (2, 4):
        tokens = c.trainer.max_tokens_per_microbatch // divisor
        if tokens >= longest:
            yield f"trainer.max_tokens_per_microbatch={tokens}"
    if p.virtual_pipeline > 1:
        yield "parallel.virtual_pipeline=1"
    for share in (0.45, 0.4, 0.35, 0.3):
        if not plan.hardware.is_cpu and share < c.rollout.gpu_memory_utilization:
            yield f"rollout.gpu_memory_utilization={share}"
    yield f"parallel.pipeline_parallel={2 * p.pipeline_parallel}"
    if 2 * p.tensor_parallel <= plan.hardware.gpus_per_node:
        yield f"parallel.tensor_parallel={2 * p.tensor_parallel}"


def _try(plan: Plan, candidates: list[tuple[str, ...]]) -> list[Change]:
    found = []
    for overrides in candidates:
        try:
            variant = plan.variant(load(None, overrides, base=plan.config))
        except ConfigError:
            continue
        if variant.fits:
            found.append(Change(overrides=overrides, plan=variant))
    return found


def _key(override: str) -> str:
    return override.partition("=")[0]
