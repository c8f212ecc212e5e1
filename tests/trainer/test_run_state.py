"""What the trainer puts into a checkpoint comes back as it was, through a file that holds plain data only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_rest.trainer.run_state import RunState, prompt_names
from megatron_rest.types import PromptSample, Rollout, StopReason


def prompt(name: str) -> PromptSample:
    return PromptSample(prompt_id=name, token_ids=np.arange(3, dtype=np.int32), ground_truth="")


def rollout(name: str, length: int, reward: float | None) -> Rollout:
    rng = np.random.default_rng(length)
    return Rollout(
        prompt_id=name,
        token_ids=rng.integers(0, 1000, length).astype(np.int32),
        log_probs=rng.normal(size=length).astype(np.float32),
        loss_mask=rng.random(length) < 0.7,
        stop_reason=StopReason.CUT if length % 2 else StopReason.EOS,
        policy_version=length,
        reward=reward,
        versions=np.sort(rng.integers(length - 3, length + 1, length)).astype(np.int32),
    )


PROMPTS = [[prompt("a"), prompt("b"), prompt("a")], [prompt("c"), prompt("d"), prompt("e")]]
QUEUE = [
    {3: rollout("b", 5, None), 0: rollout("a", 8, 0.25), 5: rollout("a", 4, None)},
    {2: rollout("d", 7, None)},
]
STATE = RunState(
    weighting={"mean": [None, 0.1]},
    num_restarts=3,
    skipped_in_a_row=2,
    next_prompts=prompt_names(PROMPTS),
    group_size=2,
    queue=QUEUE,
)


def test_state_survives_a_file(tmp_path: Path) -> None:
    torch.save(STATE.as_extra(), tmp_path / "extra.pt")
    loaded = torch.load(tmp_path / "extra.pt", weights_only=True)  # nothing but numbers, strings, lists and tensors
    back = RunState.of_extra(loaded, PROMPTS, group_size=2)
    assert (back.weighting, back.num_restarts, back.skipped_in_a_row, back.next_prompts) == (
        STATE.weighting, 3, 2, (("a", "b", "a"), ("c", "d", "e")),
    )  # fmt: skip
    assert back.queue is not None
    for ours, theirs in zip(QUEUE, back.queue, strict=True):
        assert ours.keys() == theirs.keys()
        for a, b in ((ours[key], theirs[key]) for key in ours):
            assert (a.prompt_id, a.stop_reason, a.policy_version, a.reward) == (
                b.prompt_id, b.stop_reason, b.policy_version, b.reward,
            )  # fmt: skip
            for name in ("token_ids", "log_probs", "loss_mask", "versions"):
                x, y = getattr(a, name), getattr(b, name)
                assert x.dtype == y.dtype and x.tobytes() == y.tobytes()
    late = RunState.queue_tensors(QUEUE)
    assert [name.split(".")[0] for name in late] == ["queue"]
    assert torch.equal(next(iter(late.values())), next(iter(STATE.as_extra()["queue"].values())))


def test_a_queue_of_other_prompts_is_dropped_and_the_difference_seen() -> None:
    def queue(prompts: list[list[PromptSample]], group_size: int = 2) -> list[int] | None:
        state = RunState.of_extra(STATE.as_extra(), prompts, group_size=group_size)
        assert state.next_prompts == (("a", "b", "a"), ("c", "d", "e"))
        return None if state.queue is None else [len(known) for known in state.queue]

    assert queue(PROMPTS) == [3, 1]
    assert queue(PROMPTS[:1]) == [3], "a run that is less far ahead"
    assert queue([PROMPTS[0], PROMPTS[0]]) == [3]
    assert queue([PROMPTS[0][:2], PROMPTS[1]]) == []
    assert queue(PROMPTS, group_size=3) is None
    empty = RunState.of_extra(replace(STATE, queue=None).as_extra(), PROMPTS, group_size=2)
    assert empty.queue is None
