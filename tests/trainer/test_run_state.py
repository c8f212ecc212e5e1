"""What the trainer puts into a checkpoint comes back as it was, through a file that holds plain data only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_rest.trainer.run_state import RunState
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason


def prompt(name: str) -> PromptSample:
    return PromptSample(prompt_id=name, token_ids=np.arange(3, dtype=np.int32), ground_truth="")


def rollout(name: str, length: int, reward: float | None) -> Rollout:
    rng = np.random.default_rng(length)
    return Rollout(
        prompt_id=name,
        token_ids=rng.integers(0, 1000, length).astype(np.int32),
        log_probs=rng.normal(size=length).astype(np.float32),
        loss_mask=rng.random(length) < 0.7,
        stop_reason=StopReason.TOOL_TIMEOUT if length % 2 else StopReason.EOS,
        policy_version=length,
        reward=reward,
    )


PROMPTS = [prompt("a"), prompt("b"), prompt("a")]
GROUPS = [
    RolloutGroup(prompt=p, rollouts=(rollout(p.prompt_id, 4 + i, None), rollout(p.prompt_id, 9 + i, 0.25)))
    for i, p in enumerate(PROMPTS)
]


def test_state_survives_a_file(tmp_path: Path) -> None:
    state = RunState(
        weighting={"mean": [None, 0.1]}, num_restarts=3, skipped_in_a_row=2, next_prompts=("a", "b", "a"), queue=GROUPS
    )
    torch.save(state.as_extra(), tmp_path / "extra.pt")
    loaded = torch.load(tmp_path / "extra.pt", weights_only=True)  # nothing but numbers, strings, lists and tensors
    back = RunState.of_extra(loaded, PROMPTS)
    assert (back.weighting, back.num_restarts, back.skipped_in_a_row, back.next_prompts) == (
        state.weighting, 3, 2, ("a", "b", "a"),
    )  # fmt: skip
    assert back.queue is not None
    for ours, theirs in zip(GROUPS, back.queue, strict=True):
        assert ours.prompt is theirs.prompt
        for a, b in zip(ours.rollouts, theirs.rollouts, strict=True):
            assert (a.prompt_id, a.stop_reason, a.policy_version, a.reward) == (
                b.prompt_id, b.stop_reason, b.policy_version, b.reward,
            )  # fmt: skip
            for name in ("token_ids", "log_probs", "loss_mask"):
                x, y = getattr(a, name), getattr(b, name)
                assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def test_a_queue_of_other_prompts_is_dropped_and_the_difference_seen() -> None:
    state = RunState(weighting={}, num_restarts=0, skipped_in_a_row=0, next_prompts=("a", "b", "a"), queue=GROUPS)
    other = RunState.of_extra(state.as_extra(), PROMPTS[:2])
    assert other.queue is None and other.next_prompts == ("a", "b", "a")
    empty = RunState(weighting={}, num_restarts=0, skipped_in_a_row=0, next_prompts=(), queue=None)
    assert RunState.of_extra(empty.as_extra(), []).queue is None
