"""The planner's counts against real Megatron policies on gloo ranks: parameters exactly, peak memory within 15 %."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rest.algorithms import rest_policy_loss
from megatron_rest.config import RestConfig, load
from megatron_rest.mcore.tensor_memory import TensorMemory
from megatron_rest.planner.hardware import HARDWARE
from megatron_rest.planner.parameters import count_stages
from megatron_rest.planner.plan import make_plan
from megatron_rest.trainer.setup import make_batch
from megatron_rest.types import TokenRegion, TrainSample
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import make_policy
from tests.helpers.tiny_model import build_tiny_model

TOLERANCE = 0.15
WORLD_SIZE = 4
SEQUENCES, LENGTH = 16, 176  # the demo's mean; four to a microbatch
DEMO = "parallel.tensor_parallel=2 parallel.pipeline_parallel=2"  # the layout of launch/rest_toy.py
LAYOUTS = {
    "demo": DEMO,
    "sequence parallel": f"{DEMO} parallel.sequence_parallel=true",
    "recompute mlp": f"{DEMO} parallel.recompute=mlp",
    "recompute full": f"{DEMO} parallel.recompute=full",
    "bfloat16": f"{DEMO} model.dtype=bfloat16",
    "interleaved": "parallel.pipeline_parallel=2 parallel.virtual_pipeline=2 parallel.distributed_optimizer=true",
    "data parallel": "parallel.tensor_parallel=2 parallel.distributed_optimizer=true",
    "experts": "parallel.pipeline_parallel=2 parallel.expert_parallel=2 parallel.distributed_optimizer=true",
}
MAIN = ["demo", "recompute full", "experts"]


def configuration(folder: Path, name: str) -> RestConfig:
    """``folder`` holds the models ``dense`` and ``moe``."""
    return load(
        overrides=[
            f"model.path={folder / ('moe' if name == 'experts' else 'dense')}",
            "model.max_sequence_length=352",
            f"data.max_prompt_tokens={LENGTH - 96}",
            "rollout.max_response_tokens=96",
            f"trainer.max_tokens_per_microbatch={4 * LENGTH}",
            "data.prompts_per_step=4",
            "rollout.rollouts_per_prompt=4",
            "trainer.share_prompts=off",  # the samples have no prompt in common
            *LAYOUTS[name].split(),
        ]
    )


def samples(vocab_size: int) -> list[TrainSample]:
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH + 1) > LENGTH // 2
    regions = np.where(mask, int(TokenRegion.THINK), int(TokenRegion.CONTEXT)).astype(np.int8)
    return [
        TrainSample(
            token_ids=rng.integers(0, vocab_size, LENGTH + 1).astype(np.int32),
            loss_mask=mask,
            region_ids=regions,
            rollout_log_probs=np.full(LENGTH + 1, -7.0, np.float32),
            advantage=1.0 if i % 2 else -0.5,
            sequence_id=i,
        )
        for i in range(SEQUENCES)
    ]


def measure(config: RestConfig) -> dict[str, float]:
    """Of this rank: parameters, peak bytes of an update, and what the update computed."""
    memory = TensorMemory()
    with memory:
        parts = make_policy(config)
        batch = make_batch(parts, samples(parts.shape.vocab_size), max_tokens=config.trainer.max_tokens_per_microbatch)
        weighed = [
            m.with_scores(old_log_probs=s.log_probs, token_weights=torch.ones_like(s.log_probs))
            for m, s in zip(batch.microbatches, parts.policy.score(batch.microbatches), strict=True)
        ]
        batch = type(batch)(microbatches=tuple(weighed), totals=batch.totals)
        loss = partial(rest_policy_loss, config=config.loss)
        parts.policy.update(batch, loss)  # makes the optimiser's moments
        memory.mark()
        report = parts.policy.update(batch, loss)
    return {
        "stage": parts.context.pp_rank,
        "parameters": sum(p.numel() for p in parts.policy.named_shards().values()),
        "peak": memory.peak,
        "grad_norm": report.grad_norm,
    }


def worker(rank: int, world_size: int, folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    from megatron.core import parallel_state

    measured = {}
    for name in names:
        measured[name] = measure(configuration(folder, name))
        parallel_state.destroy_model_parallel()
    return measured


def build_models(folder: Path) -> Path:
    """The demo's shape, and the same with experts; no size depends on weights."""
    shape = {"hidden": 256, "layers": 4, "head_dim": 64, "vocab_size": 2048, "with_tokenizer": False}
    build_tiny_model(folder / "dense", intermediate_size=768, **shape)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    build_tiny_model(folder / "moe", arch="qwen3_moe", intermediate_size=768, **experts, **shape)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def measured(models) -> Measured:
    return Measured(models)


class Measured:
    """What every rank measured of a layout; the layouts of ``make test`` together, the others when one is asked for."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._found: list[dict[str, dict[str, float]]] = [{} for _ in range(WORLD_SIZE)]

    def of(self, layout: str) -> list[dict[str, float]]:
        if layout not in self._found[0]:
            names = MAIN if layout in MAIN else [name for name in LAYOUTS if name not in MAIN]
            for found, new in zip(self._found, run_distributed(worker, WORLD_SIZE, self._models, names), strict=True):
                found.update(new)
        return [rank[layout] for rank in self._found]


every_layout = pytest.mark.parametrize(
    "layout", [name if name in MAIN else pytest.param(name, marks=pytest.mark.extended) for name in LAYOUTS]
)


@every_layout
@pytest.mark.slow
def test_every_rank_holds_as_many_parameters_as_planned(layout, models, measured):
    config = configuration(models, layout)
    plan = make_plan(config, HARDWARE["cpu"], world_size=WORLD_SIZE)
    stages = count_stages(plan.shape, config.parallel)
    for rank in measured.of(layout):
        assert rank["parameters"] == stages[int(rank["stage"])].total


@every_layout
def test_peak_memory_of_an_update_is_as_planned(layout, models, measured):
    plan = make_plan(configuration(models, layout), HARDWARE["cpu"], world_size=WORLD_SIZE)
    for rank in measured.of(layout):
        planned = plan.stages[int(rank["stage"])].training_peak
        assert planned == pytest.approx(rank["peak"], rel=TOLERANCE), f"stage {rank['stage']}"


@pytest.mark.parametrize("layout", [pytest.param("recompute mlp", marks=pytest.mark.extended), "recompute full"])
def test_recomputing_changes_memory_and_not_the_gradient(layout, measured):
    for rank, demo in zip(measured.of(layout), measured.of("demo"), strict=True):
        assert rank["peak"] < 0.95 * demo["peak"]
        assert rank["grad_norm"] == pytest.approx(demo["grad_norm"], rel=1e-6)
