"""Transfers into a real vLLM: it then computes what transformers computes with the same weights; faults are noticed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_rest.config import RolloutConfig, RolloutQuantization, WeightSyncConfig
from megatron_rest.model_map import ModelShape, parameter_map, to_megatron
from megatron_rest.rollout.engine import NO_WEIGHTS, EngineStateError
from megatron_rest.rollout.vllm_engine import VllmEngine
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weight_sync.sync import WeightSync, WeightSyncError
from tests.helpers.tiny_model import build_tiny_model, perturb, read_config

PROMPT = np.arange(60, 130)  # longer than two blocks of the prefix cache
NEW_TOKENS = 12
FP32_BAND, BF16_BAND = 1e-4, 6e-2


@dataclass
class Bench:
    """One engine, the trainer's shards behind a source, and a folder with the trainer's present weights."""

    engine: VllmEngine
    sync: WeightSync
    folder: Path
    state: dict[str, torch.Tensor]
    shards: dict[str, torch.Tensor] = field(default_factory=dict)
    version: int = 0

    def train(self, seed: int) -> None:
        """Change every weight, as an optimiser would: in the trainer's own storage."""
        self.state.update(perturb(self.state, seed=seed))
        shape = ModelShape.from_hf_config(read_config(self.folder), vocab_multiple=64)
        for spec in parameter_map(shape):
            new = to_megatron(spec, self.state, tp_rank=0, tp_size=1, shape=shape)
            old = self.shards.setdefault(spec.megatron_name, new.clone())
            old.copy_(new)

    def push(self) -> Any:
        self.version += 1
        return self.sync.push(self.version)

    def reference(self, dtype: torch.dtype) -> Any:
        """transformers with the trainer's present weights, read from a checkpoint."""
        save_file(self.state, self.folder / "model.safetensors", metadata={"format": "pt"})
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)


def make_bench(
    folder: Path,
    *,
    dtype: str,
    random_weights: bool,
    transport: str = "local",
    tensor_parallel: int = 1,
    quantization: RolloutQuantization = RolloutQuantization.NONE,
    **model: Any,
) -> Bench:
    build_tiny_model(folder, with_tokenizer=False, **model)
    state = load_file(folder / "model.safetensors")
    if random_weights:
        (folder / "model.safetensors").unlink()
    engine = VllmEngine(
        folder,
        RolloutConfig(kv_cache_bytes=16 << 20, dtype=dtype, tensor_parallel=tensor_parallel, quantization=quantization),
        seed=0,
        max_model_len=256,
        transport=transport,
        random_weights=random_weights,
    )
    bench = Bench(engine=engine, sync=None, folder=folder, state=state)  # type: ignore[arg-type]
    bench.train(seed=1)
    shape = ModelShape.from_hf_config(read_config(folder), vocab_multiple=64)
    source = MegatronWeightSource(lambda: bench.shards, parameter_map(shape), shape, bucket_bytes=1 << 16)
    bench.sync = WeightSync(engine, source, WeightSyncConfig(transport=transport, bucket_bytes=1 << 17))
    return bench


def gap_to(bench: Bench, dtype: torch.dtype) -> tuple[float, bool]:
    """Largest |log-prob difference| to transformers, greedy and prompt, and whether the greedy tokens are the same."""
    model = bench.reference(dtype)
    tokens, log_probs = bench.engine.greedy(PROMPT, NEW_TOKENS)
    full = torch.tensor([*PROMPT.tolist(), *tokens.tolist()])
    with torch.no_grad():
        table = model(full[None]).logits[0].float().log_softmax(-1)
    wanted = table[:-1].gather(-1, full[1:, None])[:, 0].numpy()
    got = bench.engine.prompt_log_probs(full.numpy())
    assert got[0] == 0 and got.dtype == np.float32 and len(got) == len(full)
    gap = max(np.abs(wanted[-NEW_TOKENS:] - log_probs).max(), np.abs(wanted - got[1:]).max())
    return float(gap), table[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens.tolist()


SETTINGS = {
    "qwen3-tied": {"arch": "qwen3", "tied": True, "dtype": "float32", "random_weights": False},
    "qwen3-untied": {"arch": "qwen3", "tied": False, "dtype": "float32", "random_weights": True},
    "qwen2-bias": {"arch": "qwen2", "tied": True, "dtype": "float32", "random_weights": True, "num_attention_heads": 2},
    "llama-bf16": {"arch": "llama", "tied": False, "dtype": "bfloat16", "random_weights": False},
    "qwen3_moe": {"arch": "qwen3_moe", "tied": False, "dtype": "float32", "random_weights": False},
}


MAIN = ("qwen3-tied", "qwen3_moe")  # and by slices, whose names come from the same map: test_sliced.py


@pytest.mark.parametrize(
    "name", [name if name in MAIN else pytest.param(name, marks=pytest.mark.extended) for name in SETTINGS]
)
@pytest.mark.slow
def test_engine_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    setting = dict(SETTINGS[name])
    if setting.get("num_attention_heads") == 2:
        setting |= {"num_key_value_heads": 1}
    bench = make_bench(tmp_path, **setting)
    try:
        if setting["random_weights"]:
            with pytest.raises(EngineStateError, match="holds no valid weights"):
                bench.engine.greedy(PROMPT, 1)
        else:
            bench.engine.greedy(PROMPT, NEW_TOKENS)  # fills the prefix cache with old keys and values
        before = None
        for seed in (2, 3):
            bench.train(seed)
            report = bench.push()
            is_exact = setting["dtype"] == "float32"
            gap, is_greedy_equal = gap_to(bench, torch.float32 if is_exact else torch.bfloat16)
            assert gap < (FP32_BAND if is_exact else BF16_BAND)
            assert is_greedy_equal or not is_exact
            assert bench.engine.policy_version == report.version == bench.version
            assert report.attempts == 1 and report.num_tensors == len(bench.state)
            assert report.num_bytes == sum(t.numel() * t.element_size() for t in bench.state.values())
            assert report.checksum != before
            before = report.checksum
    finally:
        bench.engine.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = make_bench(tmp_path_factory.mktemp("model"), arch="qwen3", tied=True, dtype="float32", random_weights=True)
    bench.push()
    yield bench
    bench.engine.close()


def test_equal_weights_give_equal_checksums_and_no_random_state_is_touched(bench: Bench) -> None:
    before = random.getstate(), torch.get_rng_state()
    assert bench.push().checksum == bench.push().checksum
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())


def flip(name: str, times: int) -> Any:
    """Fault injection: one bit of one byte of ``name`` changes on the way, in the first ``times`` passes."""
    left = [times]

    def tamper(tensor_name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor_name != name or left[0] == 0:
            return tensor
        left[0] -= 1
        broken = tensor.clone()
        broken.view(-1).view(torch.uint8)[-3] ^= 0x04
        return broken

    return tamper


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.0.self_attn.k_norm.weight", "model.layers.1.self_attn.v_proj.weight"],
)
def test_flipped_byte_is_noticed_and_mended_by_a_resend(bench: Bench, name: str) -> None:
    bench.train(seed=4)
    bench.sync._tamper = flip(name, times=1)
    try:
        report = bench.push()
    finally:
        bench.sync._tamper = None
    assert report.attempts == 2
    gap, is_greedy_equal = gap_to(bench, torch.float32)
    assert gap < FP32_BAND and is_greedy_equal


def test_byte_that_stays_flipped_stops_with_its_name(bench: Bench) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bench.sync._tamper = flip(name, times=2)
    try:
        with pytest.raises(WeightSyncError, match=f"attempt 2 of 2: bytes received differ from bytes sent in {name}"):
            bench.push()
    finally:
        bench.sync._tamper = None
    assert bench.engine.policy_version == NO_WEIGHTS
    with pytest.raises(EngineStateError, match="holds no valid weights"):
        bench.engine.greedy(PROMPT, 1)
    bench.push()  # a good transfer makes the engine usable again
    assert gap_to(bench, torch.float32)[0] < FP32_BAND


def test_parameter_that_nothing_was_sent_for_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps the old values and only logs a warning."""
    source = bench.sync._source
    names = [m.name for m in source.metadata() if m.name != "model.layers.0.mlp.down_proj.weight"]
    whole = type(source).__iter__
    monkeypatch.setattr(
        type(source), "__iter__", lambda self: ((name, tensor) for name, tensor in whole(self) if name in names)
    )
    with pytest.raises(WeightSyncError, match=r"layers.0.mlp.down_proj.weight \(engine parameter that nothing"):
        bench.push()
    monkeypatch.undo()
    bench.push()


def test_prefix_cache_of_old_weights_is_not_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.engine.greedy(PROMPT, 2)
    cached = []
    run = bench.engine._run
    monkeypatch.setattr(bench.engine, "_run", lambda *a: (out := run(*a), cached.append(out[0].num_cached_tokens))[0])
    bench.engine.greedy(PROMPT, 2)
    bench.train(seed=5)
    bench.push()
    bench.engine.greedy(PROMPT, 2)
    assert cached == [64, 0]  # the cache works (two blocks of 32), and is empty after a transfer
    monkeypatch.setattr(bench.engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(WeightSyncError, match="this engine kept its prefix cache"):
        bench.push()
    assert bench.engine.policy_version == NO_WEIGHTS
    monkeypatch.undo()
    bench.push()


def test_an_engine_that_cannot_be_asked_is_refused_by_all_ranks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(bench.engine, "weight_layout", fails)
    with pytest.raises(ConnectionError, match="an engine did not say how it is laid out: MemoryError: no room"):
        WeightSync(bench.engine, bench.sync._source, WeightSyncConfig())


def test_source_is_drained_when_the_engine_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gathers are collectives: a rank whose engine fails must not leave its peers waiting."""
    taken = []
    whole = type(bench.sync._source).__iter__

    def counted(self: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for item in whole(self):
            taken.append(item[0])
            yield item

    def fails(info: dict[str, Any]) -> None:
        next(iter(info["weights"]))
        raise MemoryError("no room")

    monkeypatch.setattr(type(bench.sync._source), "__iter__", counted)
    monkeypatch.setattr(bench.engine, "update_weights", fails)
    with pytest.raises(WeightSyncError, match="the engine raised MemoryError: no room"):
        bench.push()
    assert len(taken) == len(bench.state)
    monkeypatch.undo()
