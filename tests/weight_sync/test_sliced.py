"""Transfers by slices: which way a configuration chooses, what an engine takes whole, and an engine that fails."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rest.config import TRANSPORTS, WeightSyncConfig
from megatron_rest.model_map import ModelShape
from megatron_rest.rollout import vllm_engine
from megatron_rest.weight_sync.engine_side import worker_tensors
from megatron_rest.weight_sync.layouts import EngineLayout, engine_tensors, engine_workers
from megatron_rest.weight_sync.sliced import SliceTransport
from megatron_rest.weight_sync.stream import StreamTransport
from megatron_rest.weight_sync.sync import WeightSync, WeightSyncError, make_transport
from tests.weight_sync.test_plan import _dense
from tests.weight_sync.test_sync import BF16_BAND, FP32_BAND, SETTINGS, flip, gap_to, make_bench


def test_every_transport_is_chosen_by_name() -> None:
    """One plan and one code path for CPU and GPU; only the link differs."""
    source: Any = object()
    chosen = {name: make_transport(source, WeightSyncConfig(transport=name)) for name in TRANSPORTS}
    for name, backend in (("gloo", "gloo"), ("nccl", "nccl")):
        transport = chosen[name]
        assert isinstance(transport, SliceTransport) and transport._backend == backend
    assert isinstance(chosen["local"], StreamTransport)
    with pytest.raises(ValueError, match=r"weight_sync\.transport is 'pigeon': allowed: local, gloo, nccl$"):
        WeightSyncConfig(transport="pigeon")


def layout_of(shape: ModelShape, engine: EngineLayout, dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """What workers say that hold the model as the table does."""
    return [
        {
            "layout": dataclasses.asdict(worker),
            "parameters": [
                [t.name, list(t.shape), dtype] for t in engine_tensors(shape, worker, getattr(torch, dtype))
            ],
        }
        for worker in engine_workers(shape, engine)
    ]


def test_a_tensor_is_sent_whole_only_where_a_worker_holds_it_otherwise() -> None:
    shape = _dense()
    layout = layout_of(shape, EngineLayout(tensor_parallel=2))
    tensors, form = worker_tensors(shape, layout)
    assert form is None and not any(t.is_whole for worker in tensors for t in worker)
    assert {t.dtype for worker in tensors for t in worker} == {torch.bfloat16}
    padded = next(p for p in layout[1]["parameters"] if p[0] == "model.layers.2.mlp.gate_up_proj.weight")
    padded[1][0] += 16  # one worker's kernel wants other rows
    norm = next(p for p in layout[0]["parameters"] if p[0] == "model.norm.weight")
    norm[2] = "float32"  # one of them keeps it exact
    tensors, _ = worker_tensors(shape, layout)
    for i, worker in enumerate(tensors):
        whole = {t.name: (t.shape, t.dtype) for t in worker if t.is_whole}
        # What is sent whole goes in the widest type seen: the loader rounds, not the sender.
        assert whole == {f"model.layers.2.mlp.{p}_proj.weight": ((48, 32), torch.float32) for p in ("gate", "up")}
        sliced = {t.name for t in worker if not t.is_whole and t.dtype is torch.float32}
        assert sliced == ({"model.norm.weight"} if i == 0 else set())


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's worker lives in a thread of this process: slices still go through sockets."""
    monkeypatch.setattr(vllm_engine, "_TRANSPORTS_IN_PROCESS", ("local", "gloo"))


MAIN = ("qwen2-bias", "llama-bf16", "qwen3_moe")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "name", [name if name in MAIN else pytest.param(name, marks=pytest.mark.extended) for name in SETTINGS]
)
def test_engine_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    setting = dict(SETTINGS[name])
    if setting.get("num_attention_heads") == 2:
        setting |= {"num_key_value_heads": 1}
    bench = make_bench(tmp_path, transport="gloo", **setting)
    try:
        checksums = set()
        for seed in (2, 3):
            bench.train(seed)
            report = bench.push()
            is_exact = setting["dtype"] == "float32"
            gap, is_greedy_equal = gap_to(bench, torch.float32 if is_exact else torch.bfloat16)
            assert gap < (FP32_BAND if is_exact else BF16_BAND)
            assert is_greedy_equal or not is_exact
            [plan] = bench.sync.transport.plans  # type: ignore[attr-defined]
            assert report.num_bytes == plan.moved_bytes == plan.needed_bytes and plan.whole_bytes == 0
            assert report.attempts == 1
            checksums.add(report.checksum)
        assert len(checksums) == 2 and bench.push().checksum == report.checksum
        flipped = next(t.name for t in plan.tensors[0] if "layers.1.mlp" in t.name)
        bench.sync._tamper = flip(flipped, times=1)
        resent = bench.push()
        assert resent.attempts == 2 and resent.checksum == report.checksum
        _fail_at_every_call(bench)
    finally:
        bench.engine.close()


def _fail_at_every_call(bench: Any) -> None:
    """Whichever call of the engine fails, the push says so and does not hang."""
    engine, names = bench.engine, ("start_weight_update", "received_weights", "finish_weight_update")
    for name in names:

        def fails(*arguments: Any, of: str = name) -> Any:
            raise MemoryError(f"no room in {of}")

        setattr(engine, name, fails)
        with pytest.raises(WeightSyncError, match=f"MemoryError: no room in {name}; its model is half loaded"):
            bench.push()
        delattr(engine, name)
    engine.weight_layout = fails
    with pytest.raises(ConnectionError, match="an engine did not say how it is laid out: MemoryError"):
        WeightSync(engine, bench.sync._source, WeightSyncConfig(transport="gloo"))
