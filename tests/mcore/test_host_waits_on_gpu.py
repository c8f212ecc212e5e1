"""How often the host waits for the device within a step.  One GPU with Transformer Engine; no GPU has run this yet.

torch warns at every call that waits (``torch.cuda.set_sync_debug_mode``).  What a microbatch costs is the difference
between steps with more and with fewer of them: per step there may be waits (the gradient norm, metrics), within a
microbatch none of ours.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.scale import WAITS_OF_ROTATION
from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.config import LossConfig
from megatron_rest.mcore import accelerations
from megatron_rest.types import TrainBatch
from tests.helpers.policies import batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device and Transformer Engine"),
]

VOCAB, LAYERS = 1024, 2


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_groups(process_group: None) -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()


def tiny(folder: Path, arch: str) -> Path:
    return build_tiny_model(
        folder / arch, arch=arch, hidden=256, layers=LAYERS, vocab_size=VOCAB, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, intermediate_size=512, with_tokenizer=False, dtype=torch.bfloat16,
    )  # fmt: skip


def policy(folder: Path, arch: str, *overrides: str) -> Any:
    config = layout_config(tiny(folder, arch), overrides=("model.dtype=bfloat16", "rollout.dtype=bfloat16", *overrides))
    parts = make_policy(config)
    if not accelerations.active().are_layers_fused:
        pytest.skip("Transformer Engine is not installed or does not import: see `megatron-rest doctor`")
    return parts


def waits(call: Callable[[], object]) -> Counter[str]:
    """Places whose calls made the host wait."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message))


def some(batch: TrainBatch, count: int) -> TrainBatch:
    return TrainBatch(microbatches=batch.microbatches[:count], totals=batch.totals)


def test_a_wait_is_seen() -> None:
    ones = torch.ones(3, device="cuda")
    assert sum(waits(lambda: ones.sum().item()).values()) == 1
    assert not waits(lambda: ones.sum())


@pytest.mark.parametrize(
    "options",
    [{}, {"tis_cap": 2.0}, {"tis_cap": 2.0, "tis_level": "sequence"}, {"entropy_coef": 0.01}],
    ids=["plain", "tis", "sequence tis", "entropy"],
)
def test_within_a_microbatch_only_megatron_waits(options, tmp_path):
    parts = policy(tmp_path, "qwen3")
    batch = batch_of(parts, random_samples(VOCAB, count=24), max_tokens=128)
    assert len(batch.microbatches) >= 6
    steps = {n: some(batch, n) for n in (2, 4)}
    update = RestPolicyLoss(LossConfig(**options))
    for n in (4, 2, 4):  # kernels are chosen and compiled at first
        parts.policy.update(steps[n], update, with_scores=True)
    found = {n: waits(lambda n=n: parts.policy.update(steps[n], update, with_scores=True)) for n in (2, 4)}
    more = found[4] - found[2]
    ours = {place: count for place, count in more.items() if "megatron_rest" in place}
    print(
        f"a step of 2: {sum(found[2].values())} waits, of 4: {sum(found[4].values())}; two microbatches: {dict(more)}"
    )
    assert not ours, f"the host waits within a microbatch at {ours}"
    assert sum(more.values()) <= 2 * LAYERS * WAITS_OF_ROTATION, more


def test_scoring_waits_no_oftener(tmp_path):
    parts = policy(tmp_path, "qwen3")
    microbatches = batch_of(parts, random_samples(VOCAB, count=24), max_tokens=128).microbatches
    for _ in range(2):
        parts.policy.score(microbatches[:4])
    more = waits(lambda: parts.policy.score(microbatches[:4])) - waits(lambda: parts.policy.score(microbatches[:2]))
    assert not [place for place in more if "megatron_rest" in place], more


def test_experts_with_and_without_the_fused_permutation(tmp_path):
    """Sorted by one kernel or step by step, tokens reach the same experts: scores and gradients agree."""
    found = []
    for fused in ("true", "false"):
        parts = policy(tmp_path / fused, "qwen3_moe", f"megatron.transformer.moe_permute_fusion={fused}")
        batch = batch_of(parts, random_samples(VOCAB, count=24), max_tokens=256)
        scores = torch.cat([s.log_probs for s in parts.policy.score(batch.microbatches)])
        _, gradient = parts.policy.gradients(batch, RestPolicyLoss(LossConfig()))
        found.append((scores, {name: value.clone() for name, value in gradient.items()}))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    (scores, gradient), (others, other) = found
    assert float((scores - others).abs().max()) < 0.02
    for name, value in gradient.items():
        gap = (value.float() - other[name].float()).norm() / other[name].float().norm().clamp_min(1e-8)
        assert float(gap) < 0.02, (name, float(gap))


def test_the_fused_rotary_embedding_is_the_unfused_one(tmp_path):
    """Off by default.  Should this hold on the GPUs that matter, it can go on: four waits a layer fewer."""
    found = []
    for fused in ("false", "true"):
        parts = policy(tmp_path / fused, "qwen3", f"megatron.transformer.apply_rope_fusion={fused}")
        batch = batch_of(parts, random_samples(VOCAB, count=24), max_tokens=256)
        scores = torch.cat([s.log_probs for s in parts.policy.score(batch.microbatches)])
        _, gradient = parts.policy.gradients(batch, RestPolicyLoss(LossConfig()))
        assert all(bool(value.isfinite().all()) for value in gradient.values()), f"fused {fused}: not finite"
        found.append((scores, {name: value.clone() for name, value in gradient.items()}))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    (scores, gradient), (others, other) = found
    assert float((scores - others).abs().max()) < 0.05, "cosines in float32 instead of bfloat16"
    for name, value in gradient.items():
        gap = (value.float() - other[name].float()).norm() / value.float().norm().clamp_min(1e-8)
        assert float(gap) < 0.05, (name, float(gap))
