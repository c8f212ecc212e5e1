"""Where engines live: rank, device and allocator, with the real vLLM and lists of GPUs that are only named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rest.config import ConfigError, RolloutConfig
from megatron_rest.rollout import host
from megatron_rest.rollout.devices import expands_segments, visible_devices, without_expandable_segments
from megatron_rest.rollout.engine_args import check_engine_args
from megatron_rest.rollout.host import worker_environment
from megatron_rest.rollout.vllm_engine import VllmEngine, _check_place
from tests.helpers.tiny_model import build_tiny_model


@pytest.mark.slow
def test_an_engine_in_a_ranks_process_takes_the_launchers_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TP 1: vLLM's own choice of executor is local rank 0 whatever the launcher says."""
    build_tiny_model(tmp_path, with_tokenizer=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("RANK", raising=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        config = RolloutConfig(kv_cache_bytes=16 << 20, engine_args={"max_num_batched_tokens": 2048})
        engine = VllmEngine(tmp_path, config, seed=0, max_model_len=128)
        assert engine._llm.collective_rpc("place") == [(3, "cpu")]
        vllm_config = engine._llm.llm_engine.vllm_config
        assert vllm_config.parallel_config.distributed_executor_backend == "external_launcher"
        assert vllm_config.scheduler_config.max_num_batched_tokens == 2048, "engine_args reach vLLM"
        assert engine.arguments()["max_num_batched_tokens"] == 2048
        assert os.environ["LOCAL_RANK"] == "3" and "RANK" not in os.environ, "the trainer's environment is its own"
        with pytest.raises(RuntimeError, match="took local rank 3 on cpu instead of"):
            _check_place(engine._llm, (2, None))
        engine.close()
        assert dist.is_initialized(), "the trainer's group stays"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("mine", "wanted", "seen"),
    [
        (None, "2,3", "2,3"),
        ("4,5,6,7", "2,3", "6,7"),
        ("GPU-aa, GPU-bb,GPU-cc", "1", "GPU-bb"),
        ("MIG-1,MIG-2", "0,1", "MIG-1,MIG-2"),
    ],
)
def test_an_engines_gpus_are_counted_among_its_starters(mine: str | None, wanted: str, seen: str) -> None:
    assert visible_devices(wanted, {} if mine is None else {"CUDA_VISIBLE_DEVICES": mine}) == seen


def test_a_gpu_that_the_starter_does_not_see_is_refused() -> None:
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=4,5 shows 2: there is no 2"):
        visible_devices("1,2", {"CUDA_VISIBLE_DEVICES": "4,5"})


def test_engines_get_the_trainers_settings_without_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert expands_segments()
    environment = worker_environment("2,3")
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512"
    assert "PYTORCH_ALLOC_CONF" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert not expands_segments(environment)
    assert without_expandable_segments({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}) == {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enforce_eagr": True}, "has no argument enforce_eagr: did you mean enforce_eager"),
        ({"enforce_eager": "yes"}, "is 'yes' .str., and vLLM takes bool"),
        ({"max_num_batched_tokens": 0.5}, "vLLM takes int"),
        ({"kv_cache_dtype": "fp9"}, "kv_cache_dtype is 'fp9'"),
    ],
)
def test_engine_arguments_are_checked_against_vllms_own_class(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_engine_args(arguments)
    fine = {
        "enforce_eager": True,
        "attention_backend": "FLASH_ATTN",
        "cudagraph_capture_sizes": [1, 2],
        "block_size": None,
    }
    assert check_engine_args(fine) == fine


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("logprobs_mode", "of the distribution that was sampled from"),
        ("dtype", "rollout.dtype"),
        ("seed", "trainer.seed"),
        ("enable_eplb", "experts would move"),
    ],
)
def test_what_correctness_or_another_key_decides_is_no_engine_argument(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout.engine_args.{name} is decided elsewhere: .*{words}"):
        RolloutConfig(engine_args={name: "x"})


def test_what_is_wrong_with_an_engines_node_stands_in_the_jobs_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    monkeypatch.setenv("REST_JOB_LOG", str(writing))
    monkeypatch.setenv("REST_GPUS_PER_NODE", "8")
    monkeypatch.setattr(host.signal, "signal", lambda *_: None)  # this process is pytest's, not a host
    assert host.main([str(tmp_path / "engines"), "--gpus", "0"]) == 2
    os.close(writing)
    with os.fdopen(reading) as log:
        [line] = log.read().splitlines()
    assert line.startswith("engines on ") and "should use 8 GPUs" in line
    assert "should use 8 GPUs" in capfd.readouterr().err, "and in the node's own"
    assert not (tmp_path / "engines").exists()
