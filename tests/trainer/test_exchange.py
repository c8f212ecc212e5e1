"""Rollouts of every rank come back on every rank, bit for bit, in prompt order; uneven shares included."""

from __future__ import annotations

import numpy as np

from megatron_rest.trainer.exchange import all_gather_groups, pack_groups
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason
from tests.helpers.distributed import run_distributed


def make_prompts(count: int) -> list[PromptSample]:
    return [PromptSample(prompt_id=f"p{i}", token_ids=np.arange(3), ground_truth="", index=i) for i in range(count)]


def make_group(prompt: PromptSample) -> RolloutGroup:
    rng = np.random.default_rng(prompt.index)
    rollouts = []
    for _ in range(int(rng.integers(1, 4))):
        n = int(rng.integers(1, 9))
        rollouts.append(
            Rollout(
                prompt_id=prompt.prompt_id,
                token_ids=rng.integers(0, 2**20, n).astype(np.int32),
                log_probs=rng.normal(size=n).astype(np.float32),
                loss_mask=rng.integers(0, 2, n).astype(bool),
                stop_reason=StopReason.LENGTH if n > 4 else StopReason.EOS,
                policy_version=prompt.index,
                reward=None if n % 2 else n / 4,
            )
        )
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def gather(rank: int, world_size: int, cases: list[tuple[int, tuple[int, ...]]]) -> list[list[RolloutGroup]]:
    results = []
    for count, owners in cases:
        prompts = make_prompts(count)
        share = prompts[owners.index(rank) :: len(owners)] if rank in owners else []
        results.append(all_gather_groups([make_group(p) for p in share], prompts, owners=owners))
    return results


CASES = [(1, (0, 1, 2)), (7, (0, 1, 2)), (5, (0, 2)), (4, (1,))]  # engines in all ranks, in some, in one


def test_all_ranks_hold_all_groups():
    for of_rank in run_distributed(gather, 3, CASES):
        for (count, _), groups in zip(CASES, of_rank, strict=True):
            check(groups, [make_group(p) for p in make_prompts(count)])


def check(groups: list[RolloutGroup], expected: list[RolloutGroup]) -> None:
    assert [g.prompt.prompt_id for g in groups] == [g.prompt.prompt_id for g in expected]
    for got, want in zip(groups, expected, strict=True):
        for a, b in zip(got.rollouts, want.rollouts, strict=True):
            assert np.array_equal(a.token_ids, b.token_ids)
            assert np.array_equal(a.log_probs, b.log_probs)
            assert np.array_equal(a.loss_mask, b.loss_mask)
            assert (a.stop_reason, a.policy_version, a.prompt_id) == (b.stop_reason, b.policy_version, b.prompt_id)
            assert a.reward == b.reward


def test_nine_bytes_a_token() -> None:
    """Ids, log-probs and masks, and 36 bytes a rollout: what each rank receives, however many ranks there are."""
    groups = [make_group(p) for p in make_prompts(50)]
    rollouts = [r for g in groups for r in g.rollouts]
    tokens = sum(len(r.token_ids) for r in rollouts)
    assert pack_groups(groups).numel() == 9 * tokens + 36 * len(rollouts) + 8 * len(groups)
