"""Real Megatron policies on gloo ranks for tests, and batches to train them on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_rest.config import RestConfig, load
from megatron_rest.trainer.setup import PolicyParts, build_policy, make_batch
from megatron_rest.types import TokenRegion, TrainBatch, TrainSample

LAYERS = 4  # divisible by PP 2 x VPP 2


def layout_config(
    model: Path | str,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    cp: int = 1,
    ep: int = 1,
    sp: bool = False,
    distributed_optimizer: bool = False,
    overrides: tuple[str, ...] = (),
) -> RestConfig:
    """A small configuration at the given layout."""
    return load(
        overrides=[
            f"model.path={model}",
            "model.max_sequence_length=128",
            "data.max_prompt_tokens=64",
            "rollout.max_response_tokens=64",
            "trainer.max_tokens_per_microbatch=128",
            "optimizer.lr=1e-3",
            f"parallel.tensor_parallel={tp}",
            f"parallel.pipeline_parallel={pp}",
            f"parallel.virtual_pipeline={vpp}",
            f"parallel.context_parallel={cp}",
            f"parallel.expert_parallel={ep}",
            f"parallel.sequence_parallel={str(sp).lower()}",
            f"parallel.distributed_optimizer={str(distributed_optimizer).lower()}",
            *overrides,
        ]
    )


def make_policy(config: RestConfig, *, num_updates: int = 10) -> PolicyParts:
    """Collective over all ranks."""
    torch.set_num_threads(1)
    return build_policy(config, optimizer=config.optimizer, num_updates=num_updates)


def random_samples(vocab_size: int, *, count: int = 12, seed: int = 0) -> list[TrainSample]:
    """Ragged prompt + response sequences with all regions and non-zero advantages."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        length, prompt = int(rng.integers(20, 60)), int(rng.integers(5, 15))
        mask = np.arange(length) >= prompt
        regions = np.where(mask, rng.integers(1, len(TokenRegion), length), int(TokenRegion.CONTEXT))
        samples.append(
            TrainSample(
                token_ids=rng.integers(0, vocab_size, length).astype(np.int32),
                loss_mask=mask,
                region_ids=regions.astype(np.int8),
                rollout_log_probs=np.where(mask, -5.0, 0.0).astype(np.float32),
                advantage=float(rng.normal()),
                sequence_id=i,
            )
        )
    return samples


def batch_of(parts: PolicyParts, samples: list[TrainSample], *, max_tokens: int = 128) -> TrainBatch:
    """This replica's share of ``samples``."""
    return make_batch(parts, samples, max_tokens=max_tokens)
