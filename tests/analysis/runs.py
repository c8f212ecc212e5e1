"""Synthetic runs written by the real writer: known numbers, a region that comes and goes, a late checkpoint phase."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from megatron_rest.analysis import plots
from megatron_rest.analysis.series import REGIONS
from megatron_rest.trainer.metrics import MetricsWriter
from megatron_rest.types import StepReport


def make_report(step: int, *, slope: float = 0.1, seed: int = 0) -> StepReport:
    """Reward rises by ``slope`` a step; the response region has no tokens in every fifth step."""
    noise = random.Random(1000 * seed + step)
    metrics = {
        "reward/total": slope * step + noise.gauss(0, 0.05),
        "reward/format": 1 - math.exp(-step / 10),
        "reward/correctness": slope * step - 0.5,
        "reward/static": slope * step,
        "reward/accuracy": 1 - math.exp(-slope * step),
        "reward/format_valid": 1 - math.exp(-step / 10),
        "response/length": 90.0 + step,
        "response/truncated": 0.1,
        "rollout/count": 64.0,
        "entropy/all": 1 / step,
        "mismatch/abs_log_prob_mean": 2e-6 * (1 + noise.random()),
        "mismatch/abs_log_prob_max": 3e-5 * (1 + noise.random()),
        "loss/policy": noise.gauss(0, 0.1),
        "optimizer/grad_norm": 1 + noise.random(),
    }
    for i, region in enumerate(REGIONS):
        if region == "response" and step % 5 == 0:
            continue
        metrics[f"entropy/{region}"] = (i + 1) / (step + 5)
        metrics[f"weight_mass/{region}"] = float(i + 1)
        metrics[f"tokens/{region}"] = float(i + 2)
        metrics[f"mismatch/{region}"] = 1e-6 * (i + 1) * (1 + noise.random())
    seconds = {"rollout": 10.0 + noise.random(), "score": 3.0, "update": 8.0, "sync": 0.5}
    if step % 10 == 0:
        seconds["checkpoint"] = 2.0
    seconds["total"] = sum(seconds.values()) + 0.5
    return StepReport(step=step, policy_version=step, metrics=metrics, seconds=seconds)


def make_run(run_dir: Path, num_steps: int, *, slope: float = 0.1, seed: int = 0) -> Path:
    """Write ``num_steps`` reports; returns the run's folder."""
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for step in range(1, num_steps + 1):
            writer.write(make_report(step, slope=slope, seed=seed))
    return run_dir


def draw_only(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Leave the other plots out: a second each, where a test looks at none of them."""
    patch.setattr(plots, "PLOTS", {name: plots.PLOTS[name] for name in names})
