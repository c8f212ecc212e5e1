"""Rollouts of every rank come back on every rank, bit for bit, under their keys; uneven shares included."""

from __future__ import annotations

import numpy as np

from megatron_rest.trainer.exchange import all_gather_rollouts, pack_rollouts, token_versions, unpack_rollouts
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason, TrainSample
from tests.helpers.distributed import run_distributed


def make_prompts(count: int) -> list[PromptSample]:
    return [PromptSample(prompt_id=f"p{i}", token_ids=np.arange(3), ground_truth="", index=i) for i in range(count)]


SIZE = 3


def make_group(prompt: PromptSample) -> RolloutGroup:
    rng = np.random.default_rng(prompt.index)
    rollouts = []
    for _ in range(SIZE):
        n = int(rng.integers(1, 9))
        rollouts.append(
            Rollout(
                prompt_id=prompt.prompt_id,
                token_ids=rng.integers(0, 2**20, n).astype(np.int32),
                log_probs=rng.normal(size=n).astype(np.float32),
                loss_mask=rng.integers(0, 2, n).astype(bool),
                stop_reason=StopReason.LENGTH if n > 4 else StopReason.EOS,
                policy_version=prompt.index,
                versions=prompt.index - np.sort(rng.integers(0, 70, n))[::-1],
                reward=None if n % 2 else n / 4,
            )
        )
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def all_rollouts(count: int) -> dict[int, Rollout]:
    rollouts = [rollout for prompt in make_prompts(count) for rollout in make_group(prompt).rollouts]
    return dict(enumerate(rollouts))


def gather(rank: int, world_size: int, cases: list[tuple[int, list[int]]]) -> list[dict[int, Rollout]]:
    results = []
    for count, owner_of in cases:
        everything = all_rollouts(count)
        mine = {key: everything[key] for key in reversed(everything) if owner_of[key % len(owner_of)] == rank}
        names = [prompt.prompt_id for prompt in make_prompts(count) for _ in range(SIZE)]
        results.append(all_gather_rollouts(mine, names))
    return results


CASES = [(1, [0, 1, 2]), (7, [0, 1, 2]), (5, [0, 2, 2, 2]), (4, [1])]  # who has which key


def test_all_ranks_hold_all_rollouts():
    for of_rank in run_distributed(gather, 3, CASES):
        for (count, _), rollouts in zip(CASES, of_rank, strict=True):
            expected = all_rollouts(count)
            assert rollouts.keys() == expected.keys()
            for key, want in expected.items():
                check(rollouts[key], want)


def test_rollouts_are_packed_and_unpacked() -> None:
    rollouts = {3 * key: rollout for key, rollout in all_rollouts(4).items()}
    again = unpack_rollouts(pack_rollouts(rollouts), {key: r.prompt_id for key, r in rollouts.items()})
    assert again.keys() == rollouts.keys()
    for key, want in rollouts.items():
        check(again[key], want)


def test_nine_bytes_a_token() -> None:
    """Ids, log-probs and ages, and 44 bytes a rollout: what each rank receives, however many ranks there are."""
    rollouts = all_rollouts(50)
    tokens = sum(len(r.token_ids) for r in rollouts.values())
    assert pack_rollouts(rollouts).numel() == 9 * tokens + 44 * len(rollouts) + 8


def test_versions_of_a_steps_tokens() -> None:
    rollouts = [group for prompt in make_prompts(2) for group in make_group(prompt).rollouts]
    samples = [
        TrainSample(
            token_ids=np.zeros(3 + len(r.token_ids), np.int32),
            loss_mask=np.concatenate([np.zeros(3, bool), r.loss_mask]),
            region_ids=np.zeros(3 + len(r.token_ids), np.int8),
            rollout_log_probs=np.zeros(3 + len(r.token_ids), np.float32),
            advantage=0.0,
            sequence_id=i,
        )
        for i, r in enumerate(rollouts)
    ]
    expected = [v for r in rollouts for v in (0, 0, 0, *(r.versions * r.loss_mask))]
    assert token_versions(samples, rollouts).tolist() == expected


def check(a: Rollout, b: Rollout) -> None:
    assert np.array_equal(a.token_ids, b.token_ids)
    assert np.array_equal(a.log_probs, b.log_probs)
    assert np.array_equal(a.loss_mask, b.loss_mask)
    assert np.array_equal(a.versions, b.versions) and a.versions.dtype == b.versions.dtype
    assert (a.stop_reason, a.policy_version, a.prompt_id) == (b.stop_reason, b.policy_version, b.prompt_id)
    assert a.reward == b.reward
