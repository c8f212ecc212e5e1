"""An update that is not finite is skipped on every rank, named, and leaves no trace; too many in a row end the run.

Real Megatron at PP 2 and at DP 2 with the distributed optimiser; one rank alone is poisoned.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rest.mcore.policy import UpdateReport
from megatron_rest.trainer.skips import NonFiniteError, SkipCount
from megatron_rest.types import LossInputs, LossOutput
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import batch_of, layout_config, make_policy, random_samples
from tests.mcore.test_policy import make_model, smooth_loss, with_weights

LAYOUTS: dict[str, dict[str, Any]] = {"pp2": {"pp": 2}, "dp2": {"distributed_optimizer": True}}
PARAMETER = "decoder.layers.1.mlp.linear_fc2.weight"


def nan_loss(inputs: LossInputs) -> LossOutput:
    out = smooth_loss(inputs)
    return replace(out, loss_sum=out.loss_sum * math.nan)


def train(model: str, layout: dict[str, Any], script: str) -> dict[str, Any]:
    """Updates: "." as usual, "g" with one infinite gradient on one rank that has PARAMETER, "l" with a NaN loss."""
    from megatron.core import parallel_state

    parts = make_policy(layout_config(model, **layout))
    batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
    parameters = dict(parts.policy.named_parameters())
    is_poisoned = PARAMETER in parameters and parts.context.dp_rank == parts.context.dp_size - 1

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[7] = math.inf
        return gradient

    reports = []
    for kind in script:
        hook = parameters[PARAMETER].register_hook(spoil) if kind == "g" and is_poisoned else None
        reports.append(parts.policy.update(batch, nan_loss if kind == "l" else smooth_loss))
        if hook is not None:
            hook.remove()
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    parallel_state.destroy_model_parallel()
    return {"reports": reports, "weights": weights, "rank": parts.context.rank if is_poisoned else None}


def runs(rank: int, world_size: int, model: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {name: (train(model, layout, ".."), train(model, layout, ".gl.")) for name, layout in LAYOUTS.items()}


def test_a_poisoned_update_is_skipped_everywhere_and_leaves_no_trace(tmp_path: Path) -> None:
    ranks = run_distributed(runs, 2, str(make_model(tmp_path, tied=True)))
    for name in LAYOUTS:
        [poisoned] = [results[name][1]["rank"] for results in ranks if results[name][1]["rank"] is not None]
        for calm, disturbed in (results[name] for results in ranks):
            reports: list[UpdateReport] = disturbed["reports"]
            assert [r.is_skipped for r in reports] == [False, True, True, False]
            assert any(f"gradients of {PARAMETER} on rank {poisoned}" in text for text in reports[1].nonfinite)
            assert reports[1].nonfinite[0] != "loss" and reports[2].nonfinite[0] == "loss"
            assert math.isnan(reports[1].grad_norm) and math.isfinite(reports[1].loss)
            for ours, theirs in zip(reports[::3], calm["reports"], strict=True):
                assert (ours.loss, ours.grad_norm, ours.lr, ours.nonfinite) == (
                    theirs.loss,
                    theirs.grad_norm,
                    theirs.lr,
                    (),
                )
            for key, weight in calm["weights"].items():
                assert torch.equal(weight, disturbed["weights"][key]), f"{name} {key}"


def report(*nonfinite: str) -> UpdateReport:
    return UpdateReport(loss=1.0, grad_norm=1.0, lr=1.0, is_skipped=bool(nonfinite), metrics={}, nonfinite=nonfinite)


def test_the_run_ends_after_too_many_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    skips = SkipCount(2, is_reporting=True)
    with caplog.at_level(logging.WARNING):
        for outcome in (report("loss"), report("loss"), report(), report("loss"), report("3 of 4 gradients of w")):
            skips.note(outcome, where="step 4, update 1")
    assert skips.in_a_row == 2
    assert [r.getMessage() for r in caplog.records][-1] == (
        "step 4, update 1 skipped, weights unchanged (2 in a row): not finite: 3 of 4 gradients of w [help: not-finite]"
    )
    with pytest.raises(NonFiniteError, match=r"step 5, update 1: not finite: loss; 3 updates .*max_skipped 2"):
        skips.note(report("loss"), where="step 5, update 1")
    with pytest.raises(NonFiniteError):
        SkipCount(0, is_reporting=False).note(report("loss"), where="")
