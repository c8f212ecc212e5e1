"""Gradients and optimiser state leave the device and come back: the run is the same bit for bit.

On CPU device and host are the same memory, and what is tested is all but the copy's direction: which storages go, that
they are empty meanwhile, that every view is as it was, and that nothing reads what is away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.config import ConfigError, LossConfig, RestConfig, load, validate
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import VOCAB_SIZE, build_tiny_model


def three_updates(rank: int, world: int, model: str, distributed: bool, dtype: str, offloads: bool) -> Any:
    """Weights after them, and what was away: bytes said to be free, storages of gradients and state that had bytes."""
    settings = (f"model.dtype={dtype}", "trainer.offload=true")
    config = layout_config(model, distributed_optimizer=distributed, overrides=settings)
    parts = make_policy(config)
    policy = parts.policy
    loss, seen = RestPolicyLoss(LossConfig()), []
    for seed in range(3):
        if offloads:
            freed = policy.offload()
            assert policy.offload() == 0, "it is away already"
            inner = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])[0].optimizer
            state = [v for s in inner.state.values() for v in s.values() if hasattr(v, "dim") and v.dim()]
            gradients = [buffer.grad_data for chunk in policy.chunks for buffer in chunk.buffers]
            seen.append((freed, [t.untyped_storage().nbytes() for t in (*state, *gradients)]))
        batch = batch_of(parts, random_samples(VOCAB_SIZE, seed=seed))
        scores = policy.score(batch.microbatches)
        report = policy.update(batch, loss)
        assert not report.is_skipped and report.grad_norm > 0 and len(scores)
    weights = {name: tensor.float().numpy().copy() for name, tensor in policy.named_shards().items()}
    return weights, seen


@pytest.mark.parametrize(("distributed", "dtype"), [(True, "bfloat16"), (True, "float32"), (False, "float32")])
def test_updates_are_the_same(tmp_path: Path, distributed: bool, dtype: str) -> None:
    model = build_tiny_model(tmp_path / "hf", layers=LAYERS, with_tokenizer=False)
    plain, moved = (
        run_distributed(three_updates, 2, str(model), distributed, dtype, offloads) for offloads in (False, True)
    )
    for (expected, _), (found, seen) in zip(plain, moved, strict=True):
        assert expected.keys() == found.keys() and all(np.array_equal(expected[n], found[n]) for n in expected)
        parameters = sum(values.size for values in expected.values())
        state = (12 if dtype == "bfloat16" else 8) // (2 if distributed else 1)
        assert seen[0][0] >= 4 * parameters, "gradients at first, and masters"
        assert all(freed >= (4 + state) * parameters for freed, _ in seen[1:]), "then the moments, too"
        assert all(sizes and not any(sizes) for _, sizes in seen)


def test_where_it_cannot_work_it_is_refused() -> None:
    validate(load(overrides=["trainer.offload=true"]), world_size=1)
    refused: list[tuple[list[str], str]] = [
        (["rollout.replicas=1", "weight_sync.transport=gloo"], "gives them devices of their own: set trainer.offload="),
        (["megatron.optimizer.optimizer_cpu_offload=true"], "on the host always, .* set one of them to false"),
    ]
    for overrides, words in refused:
        config: RestConfig = load(overrides=["trainer.offload=true", *overrides])
        with pytest.raises(ConfigError, match=words):
            validate(config, world_size=1)
