"""Distributed checkpoints: exact resume at the same layout, any other layout to rounding, whole or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rest.config import ConfigError
from megatron_rest.mcore import checkpoint
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import batch_of, layout_config, make_policy, random_samples
from tests.mcore.test_policy import make_model, smooth_loss, with_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tied=True)


def save_half_way(rank: int, world_size: int, model: str, folder: str, layout: dict) -> list[float]:
    """Four updates; checkpoints after the second, third and fourth, the last two kept."""
    parts = make_policy(layout_config(model, **layout))
    batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
    losses = []
    for step in range(1, 5):
        report = parts.policy.update(batch, smooth_loss)
        losses.append((report.loss, report.grad_norm, report.lr))
        if step >= 2:
            extra = {"weighting": {"mean": [None, 0.25]}, "step_seen": step}
            checkpoint.save(folder, parts.policy, step=step, extra=extra, keep_last=2)
    return losses


def continue_from(rank: int, world_size: int, model: str, path: str, layouts: list[dict]) -> list[tuple]:
    from megatron.core import parallel_state

    results = []
    for layout in layouts:
        parts = make_policy(layout_config(model, **layout))
        with torch.no_grad():
            for module in parts.policy.modules:
                for parameter in module.parameters():
                    parameter.mul_(1.5)  # wrong on purpose: the checkpoint has to mend it
        step, extra = checkpoint.load(path, parts.policy)
        batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
        report = parts.policy.update(batch, smooth_loss)
        results.append((step, extra, (report.loss, report.grad_norm, report.lr)))
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("checkpoints")
    [losses, *_] = run_distributed(save_half_way, 4, str(model), str(folder), {"tp": 2, "pp": 2})
    return folder, losses


def test_only_the_last_complete_checkpoints_are_kept(saved):
    folder, _ = saved
    assert sorted(p.name for p in folder.iterdir()) == ["step_000003", "step_000004"]
    assert checkpoint.latest(folder) == folder / "step_000004"
    (folder / "step_000009.partial").mkdir()
    (folder / "step_000008").mkdir()  # no metadata: not complete
    assert checkpoint.latest(folder) == folder / "step_000004"


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [(4, {"same": {"tp": 2, "pp": 2}, "tp4": {"tp": 4}}), (2, {"pp2_vpp2": {"pp": 2, "vpp": 2}, "dp2": {}})],
    ids=["4 ranks", "2 ranks"],
)
def test_resume_at_any_layout(model, saved, world_size, layouts):
    folder, losses = saved
    path = str(folder / "step_000003")
    for results in run_distributed(continue_from, world_size, str(model), path, list(layouts.values())):
        for name, (step, extra, after) in zip(layouts, results, strict=True):
            assert step == 3
            assert extra == {"weighting": {"mean": [None, 0.25]}, "step_seen": 3}
            tolerance = 0.0 if name == "same" else 3e-5
            np.testing.assert_allclose(after, losses[3], rtol=tolerance, atol=0, err_msg=name)


def refused(rank: int, world_size: int, model: str, path: str) -> str:
    parts = make_policy(layout_config(model))
    with pytest.raises(ConfigError) as error:
        checkpoint.load(path, parts.policy)
    return str(error.value)


def test_incomplete_checkpoint_is_refused(model, tmp_path):
    [message] = run_distributed(refused, 1, str(model), str(tmp_path))
    assert "not a complete Megatron checkpoint" in message
