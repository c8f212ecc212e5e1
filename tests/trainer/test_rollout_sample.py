"""Samples put together late are those put together at once, and dealing needs none of their arrays."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rest.data.packing import RowCost, deal, shared_rows
from megatron_rest.trainer.rollout_sample import RolloutSample
from megatron_rest.types import Rollout, StopReason, TrainSample

ARRAYS = ("token_ids", "loss_mask", "region_ids", "rollout_log_probs", "marks", "token_rewards")


def both(
    number: int, *, prompt: int = 7, length: int = 5, carries_loss: bool = True
) -> tuple[RolloutSample, TrainSample]:
    rng = np.random.default_rng(number)
    asked, answer = np.arange(prompt, dtype=np.int32), rng.integers(0, 9, length).astype(np.int32)
    mask = np.arange(length) >= number % 2
    log_probs, regions = rng.normal(size=length).astype(np.float32), rng.integers(0, 4, length).astype(np.int8)
    marks, earned = rng.integers(0, 3, length).astype(np.uint8), rng.normal(size=length)
    rollout = Rollout(
        prompt_id="p", token_ids=answer, log_probs=log_probs, loss_mask=mask, stop_reason=StopReason.EOS,
        policy_version=0,
    )  # fmt: skip
    late = RolloutSample(
        asked, rollout, regions=regions, advantage=0.5, sequence_id=number, group_id=3, carries_loss=carries_loss,
        marks=marks, earned=earned,
    )  # fmt: skip
    nothing = np.zeros(prompt)
    at_once = TrainSample(
        token_ids=np.concatenate([asked, answer]),
        loss_mask=np.concatenate([nothing.astype(bool), mask & carries_loss]),
        region_ids=np.concatenate([nothing.astype(np.int8), regions]),
        rollout_log_probs=np.concatenate([nothing.astype(np.float32), log_probs]),
        advantage=0.5,
        sequence_id=number,
        group_id=3,
        marks=np.concatenate([nothing.astype(np.uint8), marks]),
        token_rewards=np.concatenate([nothing * np.nan, earned]),
    )
    return late, at_once


@pytest.mark.parametrize("carries_loss", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_the_same_as_put_together_at_once(number, carries_loss):
    late, at_once = both(number, carries_loss=carries_loss)
    for name in ("num_tokens", "num_loss_tokens", "first_loss", "advantage", "sequence_id", "group_id"):
        assert getattr(late, name) == getattr(at_once, name), name
    for count in (0, 3, 7, 9):
        np.testing.assert_array_equal(late.head(count), at_once.head(count))
    for name in ARRAYS:
        ours, theirs = getattr(late, name), getattr(at_once, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_dealing_puts_no_sample_together():
    pairs = [both(n, length=5 + n) for n in range(8)]
    late, at_once = [a for a, _ in pairs], [b for _, b in pairs]
    assert shared_rows(late) == shared_rows(at_once) == 6
    dealt = [
        deal(samples, max_rows=40, dp_size=2, multiple=1, min_bins=1, row_multiple=1, is_sharing=True, cost=RowCost())
        for samples in (late, at_once)
    ]
    assert dealt[0] == dealt[1]
    assert not any(name in vars(sample) for sample in late for name in ARRAYS)


def test_what_cannot_be_a_sample_is_refused():
    late, _ = both(0)
    _, rollout, regions, *_ = late._parts
    with pytest.raises(ValueError, match="regions of a rollout of 5 tokens has length 4"):
        RolloutSample(np.arange(3), rollout, regions=regions[1:], advantage=0.0, sequence_id=0)
    with pytest.raises(ValueError, match="needs a prompt before it"):
        RolloutSample(np.arange(0), rollout, regions=regions, advantage=0.0, sequence_id=0)
