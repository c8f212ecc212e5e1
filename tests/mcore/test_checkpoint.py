"""Distributed checkpoints: exact resume at the same layout, any other layout to rounding, whole or absent.

1. saved in the background at TP2 x PP2 while training goes on, with and without the distributed optimiser; continued at
   TP2 x PP2 (bit for bit), TP4, PP2 x VPP2, DP2 and in one process: same loss, gradient norm, learning rate, parameters
2. experts: saved at EP2 x DP2 with the distributed optimiser, continued at EP4 and EP2 x TP2
3. only whole checkpoints are kept or found; a writer that fails says so on every rank; what cannot be loaded is refused
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rest.config import ConfigError
from megatron_rest.mcore import checkpoint
from megatron_rest.mcore.checkpoint import CheckpointError, CheckpointWriter
from tests.helpers.distributed import run_distributed
from tests.helpers.gradients import full_parameters
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model
from tests.mcore.test_policy import make_model, smooth_loss, with_weights

Layout = dict[str, Any]
DISTRIBUTED = {"distributed_optimizer": True}

SAVED: dict[str, Layout] = {
    "plain": {"tp": 2, "pp": 2},
    "distributed": {"tp": 2, "pp": 2} | DISTRIBUTED,
    "experts": {"ep": 2, **DISTRIBUTED},
}
CONTINUED: dict[int, list[tuple[str, Layout]]] = {
    4: [
        ("plain", {"tp": 2, "pp": 2}),
        ("plain", {"tp": 4}),
        ("distributed", {"tp": 2, "pp": 2} | DISTRIBUTED),
        ("distributed", {"tp": 4} | DISTRIBUTED),
        ("distributed", {"tp": 2, "sp": True} | DISTRIBUTED),
        ("experts", {"ep": 4} | DISTRIBUTED),
        ("experts", {"ep": 2, "tp": 2, "sp": True} | DISTRIBUTED),
    ],
    2: [
        ("plain", {"pp": 2, "vpp": 2}),
        ("plain", {}),
        ("distributed", {"pp": 2, "vpp": 2} | DISTRIBUTED),
        ("distributed", {"cp": 2} | DISTRIBUTED),
    ],
    1: [("plain", {}), ("distributed", DISTRIBUTED)],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    dense = str(make_model(folder / "dense", tied=True))
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    experts = build_tiny_model(folder / "experts", arch="qwen3_moe", tied=False, layers=LAYERS, **shape)
    return {"plain": dense, "distributed": dense, "experts": str(experts)}


def train_and_save(rank: int, world_size: int, models: dict[str, str], folder: str) -> dict[str, dict]:
    """Four updates of each; checkpoints after the second, third and fourth, the last two kept."""
    from megatron.core import parallel_state

    results = {}
    for name, layout in SAVED.items():
        parts = make_policy(layout_config(models[name], **layout))
        batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
        writer = CheckpointWriter(Path(folder) / name, keep_last=2, is_asynchronous=name != "experts")
        for step in range(1, 5):
            report = parts.policy.update(batch, smooth_loss)  # the weights move while the step before is written
            writer.poll()
            if step >= 2:
                writer.save(parts.policy, step=step, extra={"weighting": {"mean": [None, 0.25]}, "step_seen": step})
        writer.wait()
        numbers = (report.loss, report.grad_norm, report.lr)
        results[name] = {"numbers": numbers, "parameters": full_parameters(parts)}
        parallel_state.destroy_model_parallel()
    return results


def continue_from(
    rank: int, world_size: int, models: dict[str, str], folder: str, runs: list[tuple[str, Layout]]
) -> list[dict]:
    """From step 3, with wrong weights that the checkpoint has to mend, to step 4."""
    from megatron.core import parallel_state

    results = []
    for name, layout in runs:
        parts = make_policy(layout_config(models[name], **layout))
        with torch.no_grad():
            for shard in parts.policy.named_shards().values():
                shard.mul_(1.5)
        step, extra = checkpoint.load(Path(folder) / name / "step_000003", parts.policy)
        batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
        report = parts.policy.update(batch, smooth_loss)
        numbers = (report.loss, report.grad_norm, report.lr)
        results.append({"step": step, "extra": extra, "numbers": numbers, "parameters": full_parameters(parts)})
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    [results, *_] = run_distributed(train_and_save, 4, models, str(folder))
    return folder, results


def test_only_the_last_complete_checkpoints_are_kept(saved):
    folder, _ = saved
    folder = folder / "plain"
    assert sorted(p.name for p in folder.iterdir()) == ["step_000003", "step_000004"]
    assert checkpoint.latest(folder) == folder / "step_000004"
    (folder / "step_000009.partial").mkdir()
    (folder / "step_000008").mkdir()  # no metadata: not complete
    assert checkpoint.latest(folder) == folder / "step_000004"


@pytest.mark.parametrize("world_size", CONTINUED)
def test_continue_at_any_layout(models, saved, world_size):
    folder, unbroken = saved
    runs = CONTINUED[world_size]
    ranks = run_distributed(continue_from, world_size, models, str(folder), runs)
    for number, (name, layout) in enumerate(runs):
        expected = unbroken[name]
        is_same = layout == SAVED[name]
        for result in (results[number] for results in ranks):
            assert result["step"] == 3
            assert result["extra"] == {"weighting": {"mean": [None, 0.25]}, "step_seen": 3}
            tolerance = 0.0 if is_same else 3e-5
            np.testing.assert_allclose(result["numbers"], expected["numbers"], rtol=tolerance, err_msg=f"{layout}")
        parameters = ranks[0][number]["parameters"]
        assert parameters.keys() == expected["parameters"].keys()
        for key, value in expected["parameters"].items():
            # Adam divides gradients of rounding size by their own size: a step is lr = 1e-3 at most.
            np.testing.assert_allclose(parameters[key], value, atol=0 if is_same else 2e-5, err_msg=f"{layout} {key}")


def refused(rank: int, world_size: int, models: dict[str, str], folder: str, empty: str) -> list[str]:
    messages = []
    attempts = [
        ("plain", empty, {}),
        ("plain", f"{folder}/plain", DISTRIBUTED),
        ("experts", f"{folder}/experts", DISTRIBUTED),
    ]
    for name, path, layout in attempts:
        parts = make_policy(layout_config(models[name], **layout))
        with pytest.raises(ConfigError) as error:
            checkpoint.load(Path(path) / "step_000004", parts.policy)
        messages.append(str(error.value))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    parts = make_policy(layout_config(models["plain"]))
    writer = CheckpointWriter(Path(empty) / "full", keep_last=1, is_asynchronous=True)
    with pytest.MonkeyPatch.context() as patch:  # the processes that write are forked: they inherit it
        patch.setattr("os.fsync", _disk_is_full)
        writer.save(parts.policy, step=1, extra={})
        with pytest.raises(CheckpointError) as failure:
            writer.wait()
    messages.append(str(failure.value))
    messages.append(str(checkpoint.latest(Path(empty) / "full")))
    writer.save(parts.policy, step=2, extra={})
    writer.wait()
    messages.append(sorted(p.name for p in checkpoint.latest(Path(empty) / "full").iterdir() if "written" in p.name))
    return messages


def _disk_is_full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_loaded_is_refused_and_what_cannot_be_written_is_said(models, saved, tmp_path):
    folder, _ = saved
    [[incomplete, kind, experts, failure, latest, leftovers]] = run_distributed(
        refused, 1, models, str(folder), str(tmp_path)
    )
    assert "not a complete Megatron checkpoint" in incomplete
    assert "parallel.distributed_optimizer=false" in kind
    assert "parallel.expert_parallel > 1" in experts
    assert re.search(r"could not be written: rank 0: .*No space left on device", failure)
    assert latest == "None", "nothing half-written is found"
    assert leftovers == [], "the next one is whole, and nothing else"
