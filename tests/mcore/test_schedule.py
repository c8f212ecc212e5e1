"""Learning rates: an update gets what is configured, the first, the last and after a checkpoint of any run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_rest.config import CheckpointConfig, OptimizerConfig
from megatron_rest.mcore import checkpoint
from megatron_rest.trainer.setup import PolicyParts, build_policy
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import batch_of, layout_config, random_samples
from tests.helpers.tiny_model import build_tiny_model
from tests.mcore.test_policy import smooth_loss, with_weights


def policy_of(model: str, num_updates: int, *, distributed: bool = False, **settings: Any) -> PolicyParts:
    config = layout_config(model, distributed_optimizer=distributed)
    return build_policy(config, optimizer=OptimizerConfig(**settings), num_updates=num_updates)


def rates(parts: PolicyParts, count: int) -> list[float]:
    """Learning rate of each of ``count`` real updates."""
    batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size, count=2)))
    return [parts.policy.update(batch, smooth_loss).lr for _ in range(count)]


def schedules(rank: int, world_size: int, model: str) -> dict[str, list[float]]:
    from megatron.core import parallel_state

    wanted: dict[str, tuple[int, dict[str, Any]]] = {
        "linear": (4, {"decay": "linear"}),
        "one": (1, {"decay": "linear"}),
        "constant": (3, {}),
        "warm-up": (5, {"warmup_steps": 4}),
        "warm-up of one": (2, {"warmup_steps": 1}),
        "both": (6, {"warmup_steps": 3, "decay": "linear"}),
    }
    found = {}
    for name, (count, settings) in wanted.items():
        found[name] = rates(policy_of(model, count, lr=1.0, **settings), count)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_model(tmp_path_factory.mktemp("model") / "hf", layers=2, with_tokenizer=False))


def test_every_update_has_its_rate(model: str) -> None:
    [found] = run_distributed(schedules, 1, model)
    assert found == {
        "linear": pytest.approx([1.0, 0.7, 0.4, 0.1]),
        "one": [1.0],
        "constant": [1.0, 1.0, 1.0],
        "warm-up": pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0]),
        "warm-up of one": [1.0, 1.0],
        "both": pytest.approx([1 / 3, 2 / 3, 1.0, 0.7, 0.4, 0.1]),
    }


def continued(rank: int, world_size: int, model: str, folder: str, distributed: bool) -> dict[str, Any]:
    """Four of four updates at lr 1, saved; then the same run extended, and other runs begun from its checkpoint."""
    from megatron.core import parallel_state

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(checkpoint.__name__).addHandler(handler)
    parts = policy_of(model, 4, distributed=distributed, lr=1.0, decay="linear")
    rates(parts, 4)
    writer = checkpoint.CheckpointWriter(Path(folder), CheckpointConfig())
    writer.save(parts.policy, step=4, extra={})
    writer.wait()
    parallel_state.destroy_model_parallel()
    runs: dict[str, tuple[int, dict[str, Any]]] = {
        "as it was": (4, {"lr": 1.0, "decay": "linear"}),
        "extended": (8, {"lr": 1.0, "decay": "linear"}),
        "another": (4, {"lr": 5.0, "adam_beta2": 0.9}),
    }
    found: dict[str, Any] = {}
    for name, (count, settings) in runs.items():
        said.clear()
        parts = policy_of(model, count, distributed=distributed, **settings)
        checkpoint.load(Path(folder) / "step_000004", parts.policy)
        groups = parts.policy.optimizer.param_groups
        found[name] = (rates(parts, 4), {group["betas"][1] for group in groups}, list(said))
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_brings_the_count_of_updates_and_no_settings(
    model: str, tmp_path: Path, distributed: bool
) -> None:
    found, _ = run_distributed(continued, 2, model, str(tmp_path), distributed)
    lr, betas, said = found["as it was"]
    assert (lr, betas, said) == (pytest.approx([0.1] * 4), {0.999}, [])  # past its end: the floor, never 0
    lr, betas, said = found["extended"]
    assert (lr, betas) == (pytest.approx([1 - 0.9 * i / 7 for i in (4, 5, 6, 7)]), {0.999})
    assert len(said) == 1 and "the configured one counts from here, at update 4: lr_decay_steps 3 -> 7" in said[0]
    lr, betas, said = found["another"]
    assert (lr, betas) == ([5.0] * 4, {0.9})
    assert "max_lr 1.0 -> 5.0" in said[0]
