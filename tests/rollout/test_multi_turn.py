"""Conversations with a real vLLM: ids are kept, tool outputs masked, log-probs those of the whole conversation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron_rest.config import RolloutConfig
from megatron_rest.rollout.environments.base import Answer, Message, Observation
from megatron_rest.rollout.rollouter import Conversation
from megatron_rest.rollout.translator import ChatTranslator
from megatron_rest.rollout.vllm_engine import VllmEngine
from megatron_rest.types import PromptSample, StopReason
from tests.helpers.tiny_model import build_tiny_model
from tests.rollout.test_certify import CHATML

TURNS = 3
STOPS = list(range(40, 70))  # a random model ends its turn soon when thirty of its letters do


class Echo:
    """Answers each turn but the last with how many letters it read."""

    def reset(self) -> None:
        self.lengths: list[int] = []

    def step(self, answer: Answer) -> Observation:
        self.lengths.append(len(answer.text))
        if answer.turn == TURNS - 1:
            return Observation(done=True)
        return Observation(messages=(Message(role="tool", content=f"{len(answer.text)} letters"),))

    def reward(self) -> float | None:
        return float(sum(self.lengths))

    def close(self) -> None:
        pass


def test_conversation_is_one_growing_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny_model(tmp_path, seed=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHATML
    conversation = Conversation(
        factory=lambda prompt: Echo(), translator=ChatTranslator(tokenizer), max_turns=8, timeout_seconds=30
    )
    engine = VllmEngine(
        tmp_path,
        RolloutConfig(kv_cache_bytes=32 << 20),
        seed=0,
        max_model_len=400,
        stop_token_ids=STOPS,
        conversation=conversation,
    )
    cached: list[int] = []
    step = engine._open().llm_engine.step
    monkeypatch.setattr(
        engine._open().llm_engine, "step", lambda: [(cached.append(o.num_cached_tokens), o)[1] for o in step()]
    )
    try:
        prompts = [
            PromptSample(
                prompt_id=f"p{i}", token_ids=np.arange(100 + i, 140 + i, dtype=np.int32), ground_truth="", index=i
            )
            for i in range(4)
        ]
        groups = engine.generate(prompts, rollouts_per_prompt=2, seed=5, max_response_tokens=330)
        again = engine.generate(prompts[1:2], rollouts_per_prompt=1, seed=5, max_response_tokens=330)
    finally:
        engine.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rollouts = [(g.prompt, r) for g in groups for r in g.rollouts]
    assert sum(r.stop_reason is StopReason.EOS for _, r in rollouts) >= 4
    for prompt, rollout in rollouts:
        full = torch.tensor([*prompt.token_ids.tolist(), *rollout.token_ids.tolist()])
        with torch.no_grad():
            table = model(full[None]).logits[0, len(prompt.token_ids) - 1 : -1].log_softmax(-1)
        wanted = table.gather(-1, full[len(prompt.token_ids) :, None])[:, 0].numpy()
        mask = rollout.loss_mask
        np.testing.assert_allclose(rollout.log_probs[mask], wanted[mask], atol=1e-4)
        if rollout.stop_reason is StopReason.EOS:
            edges = np.flatnonzero(np.diff(mask.astype(int)))
            assert len(edges) == 2 * (TURNS - 1), "turns of the policy with the environment's words between them"
            said = tokenizer.decode(rollout.token_ids[edges[0] + 1 : edges[1] + 1])
            turns = np.split(rollout.token_ids, edges + 1)[::2]
            letters = [len(conversation.translator.text(turn)) for turn in turns]
            assert said == f"\n<|im_start|>tool\n{letters[0]} letters<|im_end|>\n<|im_start|>assistant\n"
            assert rollout.reward == float(sum(letters))
    assert again[0].rollouts[0].token_ids.tolist() == groups[1].rollouts[0].token_ids.tolist()
    assert max(cached) >= 96, "a later turn finds what came before it in the prefix cache"
