"""A plan as text and as plain data."""

from __future__ import annotations

from typing import Any

from megatron_rest.planner.advice import Change, changes_that_fit
from megatron_rest.planner.hardware import EFFICIENCY
from megatron_rest.planner.memory import Item
from megatron_rest.planner.parameters import total_parameters
from megatron_rest.planner.plan import Plan
from megatron_rest.planner.savings import savings_of

__all__ = ["as_dict", "as_text"]


def as_text(plan: Plan) -> str:
    """The page: model, the fullest rank item by item, the other stages, time, sync, and what to change."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_time(plan), *_sync(plan), "", *_verdict(plan)])


def as_dict(plan: Plan) -> dict[str, Any]:
    """For programs: bytes and seconds."""
    return {
        "model": plan.config.model.path,
        "parameters": total_parameters(plan.shape),
        "hardware": plan.hardware.name,
        "world_size": plan.world_size,
        "stages": [
            {
                "stage": stage.stage,
                "peak_bytes": stage.peak,
                "items": {
                    i.name: i.num_bytes for i in (*stage.always, *stage.sampling, *stage.training, *stage.syncing)
                },
            }
            for stage in plan.stages
        ],
        "limit_bytes": plan.limit,
        "seconds": None
        if plan.time is None
        else {
            "rollout": plan.time.rollout,
            "score": plan.time.score,
            "update": plan.time.update,
            "between": plan.time.between,
        },
        "lengths": {
            "prompt": plan.lengths.prompt,
            "response": plan.lengths.response,
            "source": [plan.lengths.prompt_source, plan.lengths.response_source],
        },
        "training": {
            "operations": {"score": plan.work.score_flops, "update": plan.work.update_flops},
            "updates": plan.work.num_updates,
            "scored_updates": plan.work.num_scored,
            "microbatches": plan.work.packing.num_microbatches,
            "empty_microbatches": plan.work.packing.num_empty,
            "rows": plan.work.packing.rows,
            "plain_rows": plan.work.packing.plain_rows,
            "prompt_copies": plan.work.packing.prompt_copies,
            "imbalance": plan.work.packing.imbalance,
            "padding": plan.work.padding,
            "bubble": plan.work.bubble,
            "left_out": plan.work.left_out,
        },
        "savings": {
            saving.name.replace(" ", "_"): {
                "unit": "operations of a rank" if plan.time is None else "seconds",
                "before": saving.before,
                "after": saving.after,
                "is_used": saving.is_used,
                "why": saving.why,
            }
            for saving in savings_of(plan)
        },
        "sync_seconds": None
        if plan.sync is None
        else {"limit": plan.sync.limit, "gather": plan.sync.gather, "simulated": plan.sync.simulated},
        "problems": list(plan.problems),
    }


def _head(plan: Plan) -> list[str]:
    p = plan.config.parallel
    dp = p.data_parallel(plan.world_size)
    layout = f"TP {p.tensor_parallel} x PP {p.pipeline_parallel}"
    layout += f" (VPP {p.virtual_pipeline})" if p.virtual_pipeline > 1 else ""
    layout += f" x CP {p.context_parallel}" if p.context_parallel > 1 else ""
    layout += f" x DP {dp}" + (f", EP {p.expert_parallel}" if p.expert_parallel > 1 else "")
    engines = f", and {plan.num_engine_gpus} for engines" if plan.num_engine_gpus else ""
    total, active = total_parameters(plan.shape), total_parameters(plan.shape, active_only=True)
    count = f"{total / 1e9:.2f} G parameters" + (f", {active / 1e9:.2f} G a token" if active != total else "")
    return [
        f"plan: {count} ({plan.shape_source})",
        f"      {plan.world_size} x {plan.hardware.name}: {layout}{engines}; computed, not measured (docs/planner.md)",
    ]


def _memory(plan: Plan) -> list[str]:
    stage = plan.fullest
    lines = [f"memory of a rank of stage {stage.stage}, the fullest, GB:"]
    parts = {
        "always": stage.always,
        "while sampling": stage.sampling,
        "while training": stage.training,
        "while syncing": stage.syncing,
    }
    for title, items in parts.items():
        if items:
            lines += [f"  {title}", *_items(items)]
    lines.append(f"  {'peak':<21} {stage.peak / 1e9:8.2f}   of {plan.limit / 1e9:.1f}")
    if len(plan.stages) > 1:
        lines.append("  every stage: " + ", ".join(f"{s.peak / 1e9:.1f}" for s in plan.stages))
    if not plan.hardware.is_cpu:
        ranks = min(plan.hardware.gpus_per_node, plan.world_size)
        own, gathered = (ranks * max(getattr(s, name) for s in plan.stages) / 1e9 for name in ("owned", "gathered"))
        lines.append(
            f"host memory of a node's {ranks} ranks while they save, GB: at most {own:.0f} as it lies; at the end, or "
            f"with checkpoint.any_layout=every, at least {gathered:.0f}"
        )
    if plan.num_engine_gpus:
        replicas, group = plan.config.rollout.replicas, plan.config.rollout.tensor_parallel
        lines += [f"memory of a GPU of the {replicas} engines with {group} GPUs each, GB:", *_items(plan.engine)]
    return lines


def _items(items: tuple[Item, ...]) -> list[str]:
    return [f"    {item.name:<19} {item.num_bytes / 1e9:8.2f}   {item.why}" for item in items]


def _time(plan: Plan) -> list[str]:
    t, w = plan.time, plan.work
    if t is None:
        return ["time: not estimated on CPU", *_lengths(plan), *_training(plan)]
    beside = ", rollouts beside the step before" if t.is_overlapped else ""
    return [
        f"time of a step, about {t.total:.0f} s: rollout {t.rollout:.0f}, score {t.score:.0f}, "
        f"update {t.update:.0f}{beside}; between them {t.between:.0f}",
        f"  {w.score_flops + w.update_flops:.3g} operations in training; shares of the data sheet, fitted to published "
        f"runs: {_shares(plan)}",
        f"  {plan.config.trainer.steps} steps: about {t.total * plan.config.trainer.steps / 3600:.1f} h",
        *_lengths(plan),
        *_training(plan),
    ]


def _shares(plan: Plan) -> str:
    e = EFFICIENCY
    if plan.shape.num_experts:
        return f"{e.experts:.0%} of the BF16 peak and the rows' ways to experts, decoding {e.decode_experts:.0%}"
    return f"training {e.training:.0%}, scoring {e.scoring:.0%}, decoding {e.decode_bandwidth:.0%} of memory bandwidth"


def _lengths(plan: Plan) -> list[str]:
    lengths = plan.lengths
    return [
        f"  prompts of {lengths.prompt:.0f} tokens on average: {lengths.prompt_source}",
        f"  responses of {lengths.response:.0f}: {lengths.response_source}",
    ]


def _training(plan: Plan) -> list[str]:
    """Where training's time goes besides, and what each thing is worth that need not be computed."""
    w, p = plan.work, plan.work.packing
    idle = f", {w.bubble:.0%} of the time the pipeline fills and drains" if w.bubble else ""
    lines = [
        f"  {p.num_microbatches} microbatches a replica and update, {p.num_empty} empty; slowest replica "
        f"{p.imbalance:.2f} of the mean; {w.padding:.0%} padding{idle}"
    ]
    unit, scale = ("s", 1.0) if plan.time is not None else ("T operations a rank", 1e12)
    for saving in savings_of(plan):
        what = f"training {_short(saving.before / scale)} -> {_short(saving.after / scale)} {unit}"
        if not saving.is_used:
            what = f"would be {what}"
        lines.append(f"  {saving.name}: {what if saving.before > saving.after else 'nothing'} ({saving.why})")
    return lines


def _sync(plan: Plan) -> list[str]:
    if plan.sync is None:
        return []
    sync = plan.sync
    simulated = "" if sync.simulated is None else f"{_seconds(sync.simulated)} as simulated, "
    return [
        f"weight transfer of {sync.copy_bytes / 1e9:.0f} GB: {simulated}at least {_seconds(sync.limit)} if every GPU "
        f"receives what it lacks, about {_seconds(sync.gather)} with whole tensors on every GPU"
    ]


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return [f"fits: {(plan.limit - plan.peak) / 1e9:.1f} GB of a rank are left"]
    lines = [f"does not fit: {problem}" for problem in plan.problems]
    changes = changes_that_fit(plan)
    if not changes:
        return [*lines, "  no one or two changes of one layout are enough: take more nodes (nodes=), or larger GPUs"]
    return [*lines, "what would fit:", *(f"  {_change(plan, change)}" for change in changes)]


def _change(plan: Plan, change: Change) -> str:
    text = f"{' '.join(change.overrides):<60} {change.plan.peak / 1e9:6.1f} GB"
    if plan.time is not None and change.plan.time is not None:
        text += f", step {100 * (change.plan.time.total / plan.time.total - 1):+.0f} %"
    return text


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
