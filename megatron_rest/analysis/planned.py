"""What the planner said a step takes, beside what it took.

The planner's operations are exact for the lengths a run had; its seconds assume shares of a GPU's data sheet and exist
for known GPUs only.  On a CPU the operations a second are what is left to compare: of a run, and between phases.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_rest.analysis.series import RunMetrics
from megatron_rest.analysis.summary import table_lines
from megatron_rest.config import ConfigError, RestConfig, load
from megatron_rest.planner.hardware import HARDWARE, Hardware
from megatron_rest.planner.plan import Plan, make_plan

__all__ = ["planned_lines"]

_MOST_ZERO_GROUPS = 0.99  # a run in which nothing was trained has no plan


def planned_lines(run: RunMetrics) -> list[str]:
    """A table of phases; one line with the reason where nothing can be planned."""
    start = _last_start(run.run_dir)
    config = _config(run.run_dir)
    if start is None or config is None:
        return ["no plan: the run's folder has no starts.jsonl with run.yaml or config.yaml"]
    hardware = _hardware(start.get("gpu"))
    if hardware is None:
        return [f"no plan: the planner does not know {start['gpu']} (it knows {', '.join(HARDWARE)})"]
    prompt, response = _mean(run, "prompt/length"), _mean(run, "response/length")
    try:
        plan = make_plan(
            config, hardware, world_size=int(start["world_size"]), mean_prompt=prompt, mean_response=response,
            zero_groups=min(_mean(run, "advantage/zero_groups"), _MOST_ZERO_GROUPS),
        )  # fmt: skip
    except ConfigError as error:
        return [f"no plan: {error}"]
    return _table(run, plan)


def _table(run: RunMetrics, plan: Plan) -> list[str]:
    lengths, config = plan.lengths, plan.config
    sequences = config.data.prompts_per_step * config.rollout.rollouts_per_prompt
    operations = {"score": plan.work.score_flops, "update": plan.work.update_flops}
    time = plan.time
    planned = {} if time is None else {"rollout": time.rollout, "score": time.score, "update": time.update}
    if plan.sync is not None:
        planned["sync"] = plan.sync.gather
    rows = []
    for phase in ("rollout", "score", "update", "sync"):
        took, said = _seconds(run, phase), planned.get(phase)
        rate = operations.get(phase, 0.0) / took / plan.world_size if took > 0 else 0.0
        rows.append(
            [
                phase,
                "-" if said is None else f"{said:.3g}",
                f"{took:.3g}" if took > 0 else "-",
                f"{took / said:.2f}" if said and took > 0 else "-",
                f"{rate / 1e9:,.1f}" if rate > 0 else "-",
            ]
        )
    where = "this machine's CPU" if plan.hardware.is_cpu else plan.hardware.name
    notes = [
        f"mean over the steps after the first; {lengths.prompt:.0f} + {lengths.response:.0f} tokens a rollout, "
        f"{sequences} rollouts a step, {plan.world_size} rank{'s' if plan.world_size > 1 else ''} on {where}; "
        f"{plan.work.left_out:.0%} of them without a gradient; operations are the planner's, of what has to be computed"
    ]
    if time is None:
        notes.append("planned seconds: none, the planner estimates no time on a CPU")
    header = ["phase", "planned, s a step", "measured, s a step", "measured / planned", "Gop/s a rank"]
    return [*table_lines(header, rows), *notes]


def _seconds(run: RunMetrics, phase: str) -> float:
    """Mean of a phase; the first step, which compiles and allocates, is left out where there are others."""
    values = run.series(phase, part="seconds")[1]
    values = values[1:] if len(values) > 1 else values
    return float(values.mean()) if len(values) else math.nan


def _mean(run: RunMetrics, name: str) -> float:
    """0 (the planner then has its own assumption) where the run has no such metric."""
    values = run.series(name)[1]
    return float(values.mean()) if len(values) and math.isfinite(values.mean()) else 0.0


def _last_start(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "starts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(json.loads(lines[-1])) if lines else None


def _config(run_dir: Path) -> RestConfig | None:
    for name in ("config.yaml", "run.yaml"):
        if (run_dir / name).is_file():
            return load(run_dir / name)
    return None


def _hardware(gpu: str | None) -> Hardware | None:
    """The data sheet of ``NVIDIA H100 80GB HBM3``; the CPU's without a GPU."""
    if gpu is None:
        return HARDWARE["cpu"]
    words = gpu.lower().replace("-", " ").split()
    return next((sheet for name, sheet in HARDWARE.items() if name in words), None)
