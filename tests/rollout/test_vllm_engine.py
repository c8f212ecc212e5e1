"""A real vLLM behind the protocol: reproducible seeds, exact log-probs, stop reasons, and a trainer left as it was."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers

from megatron_rest.config import RolloutConfig
from megatron_rest.rollout.engine import NO_WEIGHTS, Cut, EngineStateError, Exam, make_requests, rollout_seed
from megatron_rest.rollout.vllm_engine import VllmEngine
from megatron_rest.types import PromptSample, Rollout, StopReason
from tests.helpers.tiny_model import EOS_ID, build_tiny_model

MAX_LEN = 128
TEMPERATURE = 0.7


def prompt(name: str, length: int = 24) -> PromptSample:
    ids = np.random.default_rng(len(name) + sum(map(ord, name))).integers(0, 250, length).astype(np.int32)
    return PromptSample(prompt_id=name, token_ids=ids, ground_truth="")


def make_engine(folder: Path, **config: Any) -> VllmEngine:
    settings = RolloutConfig(**{"kv_cache_bytes": 16 << 20, "temperature": TEMPERATURE, **config})
    return VllmEngine(folder, settings, seed=0, max_model_len=MAX_LEN, stop_token_ids=[EOS_ID])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), seed=3, with_tokenizer=False)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    engine = make_engine(folder)
    yield engine
    engine.close()


def sample(engine: VllmEngine, names: str, *, n: int = 4, seed: int = 11, length: int = 20) -> dict[str, list[Rollout]]:
    groups = engine.generate([prompt(x) for x in names], rollouts_per_prompt=n, seed=seed, max_response_tokens=length)
    assert [g.prompt.prompt_id for g in groups] == list(names)
    return {g.prompt.prompt_id: list(g.rollouts) for g in groups}


def test_siblings_differ_and_seeds_reproduce_whatever_the_batch(engine: VllmEngine) -> None:
    together = sample(engine, "abc")
    alone = sample(engine, "b", n=6)
    reordered = sample(engine, "cab", n=2)
    for sibling, rollout in enumerate(together["b"]):
        assert rollout.token_ids.tolist() == alone["b"][sibling].token_ids.tolist()
        np.testing.assert_allclose(rollout.log_probs, alone["b"][sibling].log_probs, atol=1e-5)
    for name in "abc":
        assert len({tuple(r.token_ids) for r in together[name]}) == 4
        for left, right in zip(together[name], reordered[name], strict=False):
            assert left.token_ids.tolist() == right.token_ids.tolist()
    assert sample(engine, "b", seed=12)["b"][0].token_ids.tolist() != alone["b"][0].token_ids.tolist()
    twice = engine.generate([prompt("a"), prompt("a")], rollouts_per_prompt=2, seed=11, max_response_tokens=20)
    assert len({tuple(r.token_ids) for g in twice for r in g.rollouts}) == 4  # drawn twice, answered differently


def test_seeds_are_distinct() -> None:
    seeds = {rollout_seed(s, f"p{p}", g) for s in range(5) for p in range(40) for g in range(8)}
    assert len(seeds) == 5 * 40 * 8
    assert all(0 <= s < 2**63 for s in seeds)
    assert rollout_seed(1, "p", 2) != rollout_seed(1, "p", 2, occurrence=1)


def scored(model: Any, prompt_ids: np.ndarray, ids: np.ndarray, *, top_p: float = 1.0) -> np.ndarray:
    """float32 [R]: log-probs of ``ids`` behind the prompt, by transformers."""
    full, start = torch.tensor([*prompt_ids.tolist(), *ids.tolist()]), len(prompt_ids)
    with torch.no_grad():
        logits = model(full[None]).logits[0, start - 1 : -1] / TEMPERATURE
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)
    return logits.log_softmax(-1).gather(-1, full[start:, None])[:, 0].numpy()


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_log_probs_are_those_of_the_sampling_distribution(folder: Path, engine: VllmEngine, top_p: float) -> None:
    """float32 against transformers: log_softmax(logits / T), renormalised over the nucleus."""
    used = engine if top_p == 1.0 else make_engine(folder, top_p=top_p)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, rollouts in sample(used, "xy").items():
        for rollout in rollouts:
            wanted = scored(model, prompt(name).token_ids, rollout.token_ids, top_p=top_p)
            np.testing.assert_allclose(rollout.log_probs, wanted, atol=1e-4)
            assert rollout.log_probs.dtype == np.float32 and rollout.token_ids.dtype == np.int32
            assert rollout.loss_mask.all() and rollout.policy_version == used.policy_version == 0
    if used is not engine:
        used.close()


def test_a_cut_rollout_goes_on_with_other_weights(folder: Path, engine: VllmEngine) -> None:
    """Cut after some iterations: a prefix of what would have come, and the rest is scored as its continuation."""
    requests = make_requests([prompt("c"), prompt("d")], rollouts_per_prompt=8, seed=4)
    whole: dict[int, Rollout] = {}
    engine.run(requests, max_response_tokens=64, on_rollout=whole.__setitem__)
    parts: dict[int, Rollout] = {}
    answers = iter([*[()] * 12, Cut.NOW])
    engine.run(requests, max_response_tokens=64, on_rollout=parts.__setitem__, more=lambda: next(answers))
    cut = {key: rollout for key, rollout in parts.items() if not rollout.is_whole}
    assert cut and parts.keys() == whole.keys() and {len(r.token_ids) for r in cut.values()} <= {11, 12, 13}
    for key, rollout in parts.items():
        count = len(rollout.token_ids)
        assert rollout.token_ids.tolist() == whole[key].token_ids[:count].tolist()
        np.testing.assert_allclose(rollout.log_probs, whole[key].log_probs[:count], atol=1e-5)
    again = [replace(request, begun=cut[request.key]) for request in requests if request.key in cut]
    ended: dict[int, Rollout] = {}
    engine.policy_version = 1  # the same weights, so that the log-probs of both parts can be scored
    try:
        engine.run(again, max_response_tokens=64, on_rollout=ended.__setitem__)
        assert ended.keys() == cut.keys() and all(rollout.is_whole for rollout in ended.values())
        for request in again:
            rollout, count = ended[request.key], len(cut[request.key].token_ids)
            assert rollout.token_ids[:count].tolist() == cut[request.key].token_ids.tolist()
            assert rollout.versions.tolist() == [0] * count + [1] * (len(rollout.token_ids) - count)
            assert len(rollout.token_ids) <= 64
        assert any(r.token_ids.tolist() != whole[key].token_ids.tolist() for key, r in ended.items()), "a new seed"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for request in again[:4]:
            rollout = ended[request.key]
            wanted = scored(model, request.prompt.token_ids, rollout.token_ids)
            np.testing.assert_allclose(rollout.log_probs, wanted, atol=1e-4)
    finally:
        engine.policy_version = 0


def test_stop_reasons(engine: VllmEngine) -> None:
    # A random model draws the end-of-turn id now and then; 64 tokens and enough siblings see both endings.
    rollouts = sample(engine, "qrs", n=16, length=64)
    endings = {r.stop_reason for group in rollouts.values() for r in group}
    assert endings == {StopReason.EOS, StopReason.LENGTH}
    for rollout in (r for group in rollouts.values() for r in group):
        is_eos = rollout.stop_reason is StopReason.EOS
        assert (rollout.token_ids[-1] == EOS_ID) == is_eos
        assert EOS_ID not in rollout.token_ids[:-1]
        assert is_eos or len(rollout.token_ids) == 64
    # Five tokens of room are left in the context.
    [group] = engine.generate([prompt("z", MAX_LEN - 5)], rollouts_per_prompt=8, seed=1, max_response_tokens=64)
    assert {len(r.token_ids) for r in group.rollouts if r.stop_reason is StopReason.CONTEXT} == {5}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_sleep_follows_the_level(level: int) -> None:
    """vLLM cannot sleep on CPU: a recorder is in its place, and the calls are what is tested."""
    calls: list[Any] = []
    engine = object.__new__(VllmEngine)
    engine._config = RolloutConfig(sleep_level=level)
    engine._llm = SimpleNamespace(sleep=lambda level: calls.append(level), wake_up=lambda: calls.append("awake"))
    engine._is_asleep, engine.policy_version = False, 3
    engine.wake_up()
    engine.sleep()
    engine.sleep()
    assert engine.policy_version == (NO_WEIGHTS if level == 2 else 3)
    if level:
        engine.policy_version = 3
        with pytest.raises(EngineStateError, match="asleep"):
            engine._usable()
    engine.wake_up()
    engine.wake_up()
    assert calls == ([level, "awake"] if level else [])


def test_bad_prompts_are_refused_by_name(engine: VllmEngine) -> None:
    with pytest.raises(ValueError, match="prompt long has 128 tokens, the context takes 1 to 127"):
        engine.generate([prompt("long", MAX_LEN)], rollouts_per_prompt=1, seed=0, max_response_tokens=4)
    with pytest.raises(ValueError, match="prompt none has 0 tokens"):
        engine.generate([prompt("none", 0)], rollouts_per_prompt=1, seed=0, max_response_tokens=4)
    with pytest.raises(ValueError, match="holds token id 9999, the vocabulary is"):
        engine.greedy([1, 9999], 2)
    with pytest.raises(ValueError, match=r"100 \+ 40 tokens do not fit a context of 128"):
        engine.greedy(list(range(100)), 40)
    assert engine.generate([], rollouts_per_prompt=2, seed=0, max_response_tokens=4) == []


def test_greedy_and_prompt_log_probs_agree(engine: VllmEngine) -> None:
    tokens, log_probs = engine.greedy(prompt("g").token_ids, 10)
    assert tokens.shape == log_probs.shape == (10,)
    again, _ = engine.greedy(prompt("g").token_ids, 10)
    assert tokens.tolist() == again.tolist()
    scored = engine.prompt_log_probs(np.concatenate([prompt("g").token_ids, tokens]))
    np.testing.assert_allclose(scored[-10:], log_probs, atol=1e-5)


def test_an_exam_is_greedy_and_leaves_sampling_as_it_was(engine: VllmEngine) -> None:
    prompts = [prompt(name) for name in "uvw"]
    before = sample(engine, "u")["u"]
    answers: dict[int, Rollout] = {}
    requests = make_requests(prompts, rollouts_per_prompt=2, seed=1)
    engine.run(requests, max_response_tokens=30, on_rollout=answers.__setitem__, exam=Exam())
    for request in requests:
        wanted, _ = engine.greedy(request.prompt.token_ids, 30)
        answer = answers[request.key]
        assert answer.token_ids.tolist() == wanted[: len(answer.token_ids)].tolist()
        assert len(answer.token_ids) == 30 or answer.token_ids[-1] == EOS_ID
        assert not answer.log_probs.any() and answer.policy_version == engine.policy_version
    assert [r.token_ids.tolist() for r in sample(engine, "u")["u"]] == [r.token_ids.tolist() for r in before]


def random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]


def test_trainer_is_left_as_it_was(folder: Path, engine: VllmEngine) -> None:
    """Random state, environment, gradient mode, default dtype and the default process group."""
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    before = random_states()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    assert dist.is_initialized()
    second = make_engine(folder)
    sample(second, "ab")
    second.greedy(prompt("a").token_ids, 4)
    assert random_states() == before
    assert {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} == environment
    assert torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32
    second.close()
    second.close()  # idempotent
    assert dist.is_initialized()  # the first engine lives, and works
    assert len(sample(engine, "a")["a"]) == 4
    with pytest.raises(EngineStateError, match="closed"):
        second.greedy([1, 2], 1)
    del os.environ["LOCAL_WORLD_SIZE"]


def test_folder_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"it has no config.json"):
        make_engine(tmp_path)
    build_tiny_model(tmp_path, with_tokenizer=False, head_dim=16)
    with pytest.raises(ValueError, match="head_dim 16 is not one of"):
        make_engine(tmp_path)
    with pytest.raises(ValueError, match="max_model_len 4096 exceeds the 512 positions"):
        VllmEngine(tmp_path, RolloutConfig(), seed=0, max_model_len=4096)
    with pytest.raises(ValueError, match="tensor_parallel is 2"):
        make_engine(tmp_path, tensor_parallel=2)
    with pytest.raises(ValueError, match="vLLM cannot sleep on CPU"):
        make_engine(tmp_path, sleep_level=1)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors"):
        make_engine(tmp_path)
