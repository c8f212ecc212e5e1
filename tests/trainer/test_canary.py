"""The canary agrees when engine and trainer hold the same weights, and stops the run when they do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.policies import layout_config, make_policy
from tests.helpers.tiny_model import EOS_ID, build_tiny_model


def sing(rank: int, world_size: int, model: str) -> tuple[float, str]:
    from megatron_rest.rollout.process import prepare_process

    prepare_process(allow_late=True)
    from megatron_rest.rollout.vllm_engine import VllmEngine
    from megatron_rest.trainer.canary import Canary, CanaryError
    from megatron_rest.types import PromptSample

    config = layout_config(model, overrides=("rollout.temperature=0.7",))  # the canary is not sampled
    parts = make_policy(config)
    engine = VllmEngine(model, config.rollout, seed=1, max_model_len=128, stop_token_ids=[EOS_ID])
    prompt = PromptSample(prompt_id="canary", token_ids=np.arange(40, 60, dtype=np.int32), ground_truth="")
    canary = Canary(prompt=prompt, num_tokens=8, tolerance=1e-3)
    agreed = canary.check(engine, parts.policy, is_first=True)
    shard = parts.policy.named_shards()["decoder.layers.1.mlp.linear_fc2.weight"]
    with torch.no_grad():
        shard.add_(0.05 * torch.randn_like(shard))  # trained on, but never transferred
    with pytest.raises(CanaryError) as error:
        canary.check(engine, parts.policy, is_first=True)
    engine.close()
    return agreed, str(error.value)


def test_canary_notices_weights_that_were_not_transferred(tmp_path):
    model = build_tiny_model(tmp_path / "hf", max_position_embeddings=256)
    [(agreed, message)] = run_distributed(sing, 1, str(model))
    assert agreed < 1e-4
    assert "differ from the trainer's by" in message
    assert "canary_tolerance" in message
