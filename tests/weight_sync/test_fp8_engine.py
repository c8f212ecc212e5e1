"""Matrices quantised by the sender, in real engines: as if vLLM had read a checkpoint in FP8."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rest.config import RolloutConfig, RolloutQuantization
from megatron_rest.rollout import vllm_engine
from megatron_rest.rollout.engine import NO_WEIGHTS
from megatron_rest.rollout.vllm_engine import VllmEngine
from megatron_rest.weight_sync.sync import WeightSyncError
from tests.helpers.fp8 import form_of, fp8_reference, stand_in_for_block_kernels, write_fp8_checkpoint
from tests.weight_sync.test_sync import PROMPT, Bench, flip, make_bench

CHANNEL, BLOCK = RolloutQuantization.FP8_CHANNEL, RolloutQuantization.FP8_BLOCK
MODEL: dict[str, Any] = {
    "arch": "qwen3",
    "tied": False,
    "hidden": 128,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
TRANSPORTS = ["gloo", pytest.param("local", marks=pytest.mark.extended)]
CASES = {  # quantisation, precision of the rest, allowed distance to transformers in nats: a quarter of tokens, all
    # An activation next to the middle between two FP8 numbers falls to either side, by 1/16 of itself: 0.06 nats are
    # seen where one did, and 2e-6 before it.
    "channel-float32": (CHANNEL, "float32", 1e-4, 3e-1),
    "channel-bfloat16": (CHANNEL, "bfloat16", 2e-1, 1.0),
    "block-float16": (BLOCK, "float16", 5e-2, 2e-1),  # the stand-in does not round activations
    "block-bfloat16": (BLOCK, "bfloat16", 1e-1, 4e-1),
}


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers live in threads of this process, slices go through sockets; kernels for blocks are stood in for."""
    monkeypatch.setattr(vllm_engine, "_TRANSPORTS_IN_PROCESS", ("local", "gloo"))
    stand_in_for_block_kernels(monkeypatch)


def assert_near_reference(bench: Bench, case: str) -> None:
    """The prompt's log-probs are those of transformers with matrices in FP8."""
    quantization, dtype, of_a_quarter, of_all = CASES[case]
    model = bench.reference(getattr(torch, dtype))
    fp8_reference(model, form_of(quantization, bench.state), quantise_inputs=quantization is CHANNEL)
    ids = torch.tensor(PROMPT)
    with torch.no_grad():
        table = model(ids[None]).logits[0].float().log_softmax(-1)
    wanted = np.asarray(table[:-1].gather(-1, ids[1:, None])[:, 0])
    gaps = np.abs(wanted - bench.engine.prompt_log_probs(PROMPT)[1:])
    assert np.quantile(gaps, 0.25) < of_a_quarter and gaps.max() < of_all, np.quantile(gaps, [0.25, 0.5, 1])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "case",
    [case if case == "block-bfloat16" else pytest.param(case, marks=pytest.mark.extended) for case in CASES],
)
def test_an_engine_holds_what_it_would_read_from_a_checkpoint(case: str, transport: str, tmp_path: Path) -> None:
    quantization, dtype = CASES[case][:2]
    bench = make_bench(
        tmp_path / "model", dtype=dtype, random_weights=True, transport=transport, quantization=quantization, **MODEL
    )
    try:
        for seed in (2, 3):
            bench.train(seed)
            report = bench.push()
            assert report.attempts == 1
            assert_near_reference(bench, case)
        if transport == "gloo":
            [plan] = bench.sync.transport.plans  # type: ignore[attr-defined]
            assert report.num_bytes == plan.moved_bytes == plan.needed_bytes and plan.whole_bytes == 0
            of_fp8 = [t for t in plan.tensors[0] if t.dtype is torch.float8_e4m3fn]
            matrices = sum(bench.state[n].numel() for n in form_of(quantization, bench.state).names)
            assert sum(t.covered_bytes for t in of_fp8) == matrices  # a byte an element, padding none
        got = bench.engine.prompt_log_probs(PROMPT)
        suffix = "weight_scale" if quantization is CHANNEL else "weight_scale_inv"
        layer = "o_proj" if transport == "gloo" else "v_proj"
        bench.sync._tamper = flip(f"model.layers.1.self_attn.{layer}.{suffix}", times=1)
        resent = bench.push()
        assert resent.attempts == 2 and resent.checksum == report.checksum
        assert np.array_equal(bench.engine.prompt_log_probs(PROMPT), got)
    finally:
        bench.engine.close()
    folder = write_fp8_checkpoint(tmp_path / "model", tmp_path / "fp8", bench.state, quantization)
    peer = VllmEngine(folder, RolloutConfig(kv_cache_bytes=16 << 20, dtype=dtype), seed=0, max_model_len=256)
    try:
        assert np.array_equal(peer.prompt_log_probs(PROMPT), got)  # bit for bit
    finally:
        peer.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_that_quantises_itself_takes_plain_weights(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, quantization="fp8_per_channel"))
    bench = make_bench(tmp_path, dtype="bfloat16", random_weights=True, transport=transport, **MODEL)
    try:
        bench.train(seed=6)
        assert bench.push().attempts == 1
        assert_near_reference(bench, "channel-bfloat16")  # it makes the same numbers as the sender
    finally:
        bench.engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_weights_that_are_not_finite_are_refused_by_name(transport: str, tmp_path: Path) -> None:
    bench = make_bench(
        tmp_path, dtype="float32", random_weights=True, transport=transport, quantization=CHANNEL, **MODEL
    )
    try:
        bench.push()
        bench.shards["decoder.layers.1.mlp.linear_fc2.weight"][3, 5] = torch.nan
        with pytest.raises(
            WeightSyncError, match=r"layers\.1\.mlp\.down_proj\.weight of the policy cannot be quantised"
        ):
            bench.push()
        # By slices nothing has left, and the engine keeps what it had.
        assert bench.engine.policy_version == (NO_WEIGHTS if transport == "local" else 1)
        bench.train(seed=5)
        bench.push()
        assert_near_reference(bench, "channel-float32")
    finally:
        bench.engine.close()


def test_a_quantised_engine_gets_its_weights_from_a_transfer_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.quantization is fp8_channel, and the folder's weights are not"):
        make_bench(tmp_path, dtype="float32", random_weights=False, quantization=CHANNEL, **MODEL)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("quantization", [pytest.param(CHANNEL, marks=pytest.mark.extended), BLOCK])
def test_experts_lie_where_a_checkpoint_puts_them(
    quantization: RolloutQuantization, transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM has no FP8 kernels for experts on CPU: what its loaders filled is compared, before any kernel packs it."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as of_channels,
    )
    from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod

    for method in (Fp8MoEMethod, of_channels.CompressedTensorsW8A8Fp8MoEMethod):
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)
    moe = {"arch": "qwen3_moe", "tied": False, "hidden": 128, "moe_intermediate_size": 256, "head_dim": 64}
    bench = make_bench(
        tmp_path / "model",
        dtype="bfloat16",
        random_weights=True,
        transport=transport,
        quantization=quantization,
        **moe,
    )
    try:
        bench.push()
        got = _parameters(bench.engine)
    finally:
        bench.engine.close()
    folder = write_fp8_checkpoint(tmp_path / "model", tmp_path / "fp8", bench.state, quantization)
    peer = VllmEngine(folder, RolloutConfig(kv_cache_bytes=16 << 20, dtype="bfloat16"), seed=0, max_model_len=256)
    try:
        wanted = _parameters(peer)
    finally:
        peer.close()
    assert got.keys() == wanted.keys() and sum("experts" in name for name in got) == 2 * 4
    for name, parameter in wanted.items():
        assert got[name].dtype is parameter.dtype and torch.equal(got[name].float(), parameter.float()), name


def _parameters(engine: VllmEngine) -> dict[str, torch.Tensor]:
    [parameters] = engine._open().apply_model(lambda model: {n: p.data.clone() for n, p in model.named_parameters()})
    return dict(parameters)
