"""The layout of the demo: Megatron's shards at TP2 x PP2, an engine of its own in each of the four ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_rest.config import RolloutConfig, WeightSyncConfig
from megatron_rest.model_map import ModelShape, parameter_map
from megatron_rest.types import PromptSample
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weight_sync.sync import SyncReport, WeightSync, WeightSyncError
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_model import EOS_ID, build_tiny_model, perturb, read_config
from tests.weight_sync.test_source import groups, local_shards

FP32_BAND = 1e-4


def run_rank(rank: int, world: int, start: str, target: str) -> dict[str, Any]:
    from megatron_rest.rollout.process import prepare_process

    prepare_process(allow_late=True)
    from megatron_rest.rollout.vllm_engine import VllmEngine

    tp_group, pp_group, tp_rank, pp_rank = groups(rank, 2, 2)
    shape = ModelShape.from_hf_config(read_config(Path(start)), vocab_multiple=16)
    shards = local_shards(shape, load_file(Path(target) / "model.safetensors"), (tp_rank, 2), pp_rank, [0, 1])
    engine = VllmEngine(
        start, RolloutConfig(kv_cache_bytes=16 << 20), seed=0, max_model_len=128, stop_token_ids=[EOS_ID]
    )
    ids = np.arange(40, 100)
    engine.greedy(ids, 2)  # keys and values of the old weights are in the cache
    source = MegatronWeightSource(lambda: shards, parameter_map(shape), shape, tp_group=tp_group, pp_group=pp_group)
    sync = WeightSync(engine, source, WeightSyncConfig())
    clean = sync.push(1)
    sync._tamper = _flip_once if rank == 2 else None  # one rank sees a fault: all of them resend
    resent = sync.push(2)
    tokens, log_probs = engine.greedy(ids, 8)
    prompt = PromptSample(prompt_id="same", token_ids=ids.astype(np.int32), ground_truth="")
    [group] = engine.generate([prompt], rollouts_per_prompt=2, seed=3, max_response_tokens=12)
    error = _push_with_broken_engine(sync, engine, rank)
    engine.close()
    alive = torch.ones(1)
    dist.all_reduce(alive)  # the default group outlives the engine
    dist.all_reduce(alive, group=tp_group)
    return {
        "clean": clean,
        "resent": resent,
        "tokens": tokens.tolist(),
        "log_probs": log_probs,
        "rollouts": [r.token_ids.tolist() for r in group.rollouts],
        "error": error,
        "alive": float(alive),
    }


_flipped: list[str] = []


def _flip_once(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if _flipped or "down_proj" not in name:
        return tensor
    _flipped.append(name)
    broken = tensor.clone()
    broken.view(-1).view(torch.uint8)[7] ^= 0x80
    return broken


def _push_with_broken_engine(sync: WeightSync, engine: Any, rank: int) -> str:
    """Rank 1's engine fails in the middle of a transfer; every rank must hear of it, none may hang."""
    if rank == 1:

        def fails(info: dict[str, Any]) -> None:
            next(iter(info["weights"]))
            raise MemoryError("no room")

        engine.update_weights = fails
    try:
        sync.push(3)
    except WeightSyncError as e:
        return str(e)
    return "no error"


@pytest.mark.extended
def test_four_engines_follow_one_sharded_policy(tmp_path: Path) -> None:
    start = build_tiny_model(tmp_path / "start", layers=4, with_tokenizer=False)
    target = build_tiny_model(tmp_path / "target", layers=4, with_tokenizer=False)
    new = perturb(load_file(target / "model.safetensors"))
    save_file(new, target / "model.safetensors", metadata={"format": "pt"})
    results = run_distributed(run_rank, 4, str(start), str(target), timeout=200)

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    full = torch.tensor([*range(40, 100), *results[0]["tokens"]])
    with torch.no_grad():
        wanted = model(full[None]).logits[0, 59:-1].log_softmax(-1)
    assert wanted.argmax(-1).tolist() == results[0]["tokens"]
    for rank, result in enumerate(results):
        assert result["tokens"] == results[0]["tokens"]
        assert result["rollouts"] == results[0]["rollouts"]  # the rank that serves a prompt does not matter
        gap = np.abs(wanted.gather(-1, full[60:, None])[:, 0].numpy() - result["log_probs"]).max()
        assert gap < FP32_BAND
        reports: list[SyncReport] = [result["clean"], result["resent"]]
        assert [r.attempts for r in reports] == [1, 2]
        assert {r.checksum for r in reports} == {results[0]["clean"].checksum}
        reason = "the engine raised MemoryError: no room" if rank == 1 else "another rank reported a fault"
        assert reason in result["error"]
        assert result["alive"] == 4 * 2
