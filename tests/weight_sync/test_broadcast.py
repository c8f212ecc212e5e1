"""Transfers to engines in processes of their own: the bytes cross a process boundary in buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rest.config import RolloutConfig, RolloutQuantization
from megatron_rest.rollout.vllm_engine import VllmEngine
from megatron_rest.weight_sync.broadcast import bucket_ranges, num_bytes
from megatron_rest.weight_sync.sync import WeightSyncError
from tests.helpers.fp8 import write_fp8_checkpoint
from tests.weight_sync.test_sync import FP32_BAND, PROMPT, flip, gap_to, make_bench


def test_buckets_cover_everything_in_order() -> None:
    sizes = [5, 1, 1, 9, 30, 2, 2]
    for limit in (1, 4, 7, 10, 1000):
        ranges = list(bucket_ranges(sizes, limit))
        assert [i for r in ranges for i in r] == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in r) >= limit for r in ranges[:-1])
        assert all(sum(sizes[i] for i in list(r)[:-1]) < limit for r in ranges)
    assert list(bucket_ranges([], 4)) == []
    assert num_bytes([3, 5], torch.bfloat16) == 30 and num_bytes([], torch.float32) == 4


@pytest.mark.slow
def test_engine_process_follows(tmp_path: Path) -> None:
    setting: dict[str, Any] = {"arch": "qwen3", "tied": True, "dtype": "float32", "random_weights": True}
    bench = make_bench(tmp_path, transport="broadcast", tensor_parallel=2, **setting)
    try:
        for seed in (2, 3):
            bench.train(seed)
            assert bench.push().attempts == 1
            gap, is_greedy_equal = gap_to(bench, torch.float32)
            assert gap < FP32_BAND and is_greedy_equal
        name = "model.layers.1.self_attn.o_proj.weight"
        bench.sync._tamper = flip(name, times=1)
        assert bench.push().attempts == 2
        assert gap_to(bench, torch.float32)[0] < FP32_BAND
        bench.sync._tamper = flip(name, times=2)
        with pytest.raises(WeightSyncError, match=f"bytes received differ from bytes sent in {name}"):
            bench.push()
    finally:
        bench.engine.close()


@pytest.mark.extended
def test_engine_process_in_fp8_follows(tmp_path: Path) -> None:
    fp8 = RolloutQuantization.FP8_CHANNEL
    setting: dict[str, Any] = {"arch": "qwen3", "tied": True, "dtype": "float32", "random_weights": True}
    bench = make_bench(tmp_path / "model", transport="broadcast", tensor_parallel=2, quantization=fp8, **setting)
    try:
        bench.train(seed=2)
        bench.sync._tamper = flip("model.layers.1.self_attn.o_proj.weight_scale", times=1)
        assert bench.push().attempts == 2
        got = bench.engine.prompt_log_probs(PROMPT)
    finally:
        bench.engine.close()
    folder = write_fp8_checkpoint(tmp_path / "model", tmp_path / "fp8", bench.state, fp8)
    config = RolloutConfig(kv_cache_bytes=16 << 20, tensor_parallel=2)
    peer = VllmEngine(folder, config, seed=0, max_model_len=256, transport="broadcast")
    try:
        assert np.array_equal(peer.prompt_log_probs(PROMPT), got)  # bit for bit
    finally:
        peer.close()
