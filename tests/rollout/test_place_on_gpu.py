"""What only GPUs show of engines: where they live, and what vLLM's Model Runner V2 samples and reports.

Without Triton, as on CPU, vLLM runs V1, whose seeds, processed log-probs and prompt log-probs are other code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rest.config import RolloutConfig
from megatron_rest.rollout.remote import RemoteEngine
from megatron_rest.rollout.vllm_engine import VllmEngine
from megatron_rest.types import PromptSample, Rollout
from tests.helpers.tiny_model import build_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
TEMPERATURE = 0.5


def model(folder: Path) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return build_tiny_model(folder / "hf", hidden=256, with_tokenizer=False, **heads)


@two_gpus
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


@two_gpus
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


def prompt(name: str) -> PromptSample:
    ids = np.asarray([ord(c) for c in f"question {name}"], dtype=np.int32)
    return PromptSample(prompt_id=name, token_ids=ids, ground_truth="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    config = RolloutConfig(dtype="bfloat16", gpu_memory_utilization=0.1, temperature=TEMPERATURE)
    engine = VllmEngine(folder, config, seed=0, max_model_len=128)
    yield engine
    engine.close()


def sample(engine: VllmEngine, names: str, *, seed: int = 11) -> dict[str, tuple[Rollout, ...]]:
    groups = engine.generate([prompt(n) for n in names], rollouts_per_prompt=4, seed=seed, max_response_tokens=20)
    return {group.prompt.prompt_id: tuple(group.rollouts) for group in groups}


def test_the_runner_is_v2(engine: VllmEngine) -> None:
    """Else the tests below say nothing that those on CPU have not said."""
    assert engine._llm.llm_engine.vllm_config.use_v2_model_runner


def test_seeds_of_the_runner(engine: VllmEngine) -> None:
    """The same batch again gives the same tokens, siblings differ, another seed gives others."""
    first, again, other = sample(engine, "abc"), sample(engine, "abc"), sample(engine, "abc", seed=12)
    for name in "abc":
        tokens = [rollout.token_ids.tolist() for rollout in first[name]]
        assert tokens == [rollout.token_ids.tolist() for rollout in again[name]]
        assert tokens != [rollout.token_ids.tolist() for rollout in other[name]]
        assert len(set(map(tuple, tokens))) == 4


def test_log_probs_of_the_runner_are_processed(folder: Path, engine: VllmEngine) -> None:
    """Those of the distribution sampled from, at this temperature, against transformers in float32."""
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    processed, raw = [], []
    for name, rollouts in sample(engine, "xyz").items():
        start = len(prompt(name).token_ids)
        for rollout in rollouts:
            ids = torch.tensor([*prompt(name).token_ids.tolist(), *rollout.token_ids.tolist()])
            with torch.no_grad():
                logits = reference(ids[None]).logits[0, start - 1 : -1]
            for scale, errors in ((TEMPERATURE, processed), (1.0, raw)):
                wanted = (logits / scale).log_softmax(-1).gather(-1, ids[start:, None])[:, 0].numpy()
                errors.extend(np.abs(rollout.log_probs - wanted))
    assert np.mean(processed) < 0.03  # bfloat16's own
    assert np.mean(raw) > 4 * np.mean(processed)


def test_prompt_log_probs_of_the_runner_are_those_of_decoding(engine: VllmEngine) -> None:
    tokens, log_probs = engine.greedy(prompt("g").token_ids, 10)
    scored = engine.prompt_log_probs(np.concatenate([prompt("g").token_ids, tokens]))
    assert scored[0] == 0 and np.abs(scored[1:]).min() > 0
    np.testing.assert_allclose(scored[-10:], log_probs, atol=0.1)
