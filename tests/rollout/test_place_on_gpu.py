"""What only GPUs show of where engines live: the device of an engine in a rank's process, and of one beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rest.config import RolloutConfig
from megatron_rest.rollout.remote import RemoteEngine
from megatron_rest.rollout.vllm_engine import VllmEngine
from tests.helpers.tiny_model import build_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def model(folder: Path) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return build_tiny_model(folder / "hf", hidden=256, with_tokenizer=False, **heads)


def test_an_engine_in_a_ranks_process_is_on_the_ranks_gpu(tmp_path: Path) -> None:
    device = torch.cuda.device_count() - 1
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        config = RolloutConfig(dtype="bfloat16", gpu_memory_utilization=0.1, engine_args={"enforce_eager": True})
        engine = VllmEngine(model(tmp_path), config, seed=0, max_model_len=128)
        assert engine._llm.collective_rpc("place") == [(device, f"cuda:{device}")]
        assert torch.cuda.current_device() == device
        engine.close()
    finally:
        dist.destroy_process_group()


def test_an_engine_process_of_two_gpus_starts_under_the_trainers_allocator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's all-reduce and its captured graphs refuse expandable segments, which the trainer uses."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    config = RolloutConfig(dtype="bfloat16", gpu_memory_utilization=0.1, tensor_parallel=2, engine_timeout_seconds=300)
    engine = RemoteEngine(model(tmp_path), config, seed=0, max_model_len=128, devices="0,1")
    try:
        engine.policy_version = 1  # random weights will do here
        assert len(engine.greedy([1, 2, 3], 5)[0]) == 5
        assert engine._pass_on("arguments")["tensor_parallel_size"] == 2
    finally:
        engine.close()
