"""Packing: every loss token appears once, shifted once, with its sequence's numbers, however the work is split."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megatron_rest.data.alignment import PackingAlignment
from megatron_rest.data.batching import batch_totals, make_microbatch, make_train_batch, pad_microbatch
from megatron_rest.types import TokenRegion
from tests.helpers.policies import random_samples

SAMPLES = random_samples(100, count=23)


def loss_tokens(microbatches) -> Counter:
    """(sequence, predicted token, position in the sequence, region, advantage, length) of every loss token."""
    seen: Counter = Counter()
    for m in microbatches:
        for t in m.loss_mask.nonzero()[:, 0].tolist():
            key = (
                int(m.sequence_ids[t]),
                int(m.labels[t]),
                int(m.position_ids[t]),
                int(m.region_ids[t]),
                float(m.advantages[t]),
                float(m.sequence_lengths[t]),
            )
            seen[key] += 1
    return seen


def expected_tokens() -> Counter:
    expected: Counter = Counter()
    for s in SAMPLES:
        for position in s.loss_mask.nonzero()[0].tolist():
            key = (
                s.sequence_id,
                int(s.token_ids[position]),
                position - 1,
                int(s.region_ids[position]),
                float(np.float32(s.advantage)),
                float(s.loss_mask.sum()),
            )
            expected[key] += 1
    return expected


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("max_tokens", "sequence", "alignment", "multiple"), [(64, 1, 1, 1), (64, 1, 4, 2), (64, 4, 8, 1), (2000, 8, 24, 1)]
)
def test_every_loss_token_once(dp_size, max_tokens, sequence, alignment, multiple):
    batches = [
        make_train_batch(
            SAMPLES,
            max_tokens=max_tokens,
            dp_rank=r,
            dp_size=dp_size,
            alignment=PackingAlignment(sequence=sequence, total=alignment),
            num_microbatches_multiple=multiple,
        )
        for r in range(dp_size)
    ]
    assert len({len(b.microbatches) for b in batches}) == 1
    assert all(len(b.microbatches) % multiple == 0 for b in batches)
    assert all(len(m.token_ids) % alignment == 0 for b in batches for m in b.microbatches)
    assert all((m.cu_seqlens.diff() % sequence == 0).all() for b in batches for m in b.microbatches)
    assert loss_tokens(m for b in batches for m in b.microbatches) == expected_tokens()
    totals = {b.totals for b in batches}
    assert len(totals) == 1, "denominators are global"
    assert totals.pop().num_tokens == sum(int(s.loss_mask.sum()) for s in SAMPLES)


def test_label_is_the_next_token():
    [sample] = SAMPLES[:1]
    microbatch = make_microbatch([sample])
    assert torch.equal(microbatch.labels[:-1], microbatch.token_ids[1:])
    assert microbatch.labels[-1] == int(sample.token_ids[-1])


def test_empty_microbatch_takes_part_without_loss():
    microbatch = make_microbatch([], alignment=PackingAlignment(sequence=2, total=4))
    assert len(microbatch.token_ids) == 4
    assert not microbatch.loss_mask.any()
    assert (microbatch.region_ids == int(TokenRegion.CONTEXT)).all()


def test_too_long_a_sample_is_refused():
    with pytest.raises(ValueError, match=r"more than the 10 of a microbatch"):
        make_train_batch(SAMPLES, max_tokens=10)


def test_samples_that_are_left_out_still_count():
    """Without a gradient they need not be there; the denominators are those of all."""
    totals = batch_totals(SAMPLES)
    batches = [make_train_batch(SAMPLES[:9], max_tokens=64, dp_rank=r, dp_size=2, totals=totals) for r in range(2)]
    assert {b.totals for b in batches} == {totals}
    microbatches = [m for b in batches for m in b.microbatches]
    counted = sum(int(m.loss_mask.sum()) + m.left_out_tokens for m in microbatches)
    assert counted == totals.num_tokens
    nobody = [make_train_batch([], max_tokens=64, dp_rank=r, dp_size=2, totals=totals) for r in range(2)]
    assert [len(b.microbatches) for b in nobody] == [1, 1], "every replica takes part in every collective"
    assert sum(m.left_out_tokens for b in nobody for m in b.microbatches) == totals.num_tokens
    with pytest.raises(ValueError, match="no samples"):
        make_train_batch([], max_tokens=64)


def test_padding_adds_one_masked_sequence():
    microbatch = make_microbatch(SAMPLES[:3])
    scored = microbatch.with_scores(old_log_probs=microbatch.rollout_log_probs, token_weights=microbatch.advantages)
    n = len(microbatch.token_ids)
    padded = pad_microbatch(scored, n + 5)
    assert len(padded.token_ids) == len(padded.old_log_probs) == len(padded.token_weights) == n + 5
    assert padded.bounds == (*microbatch.bounds, n + 5)
    assert not padded.loss_mask[n:].any() and (padded.sequence_ids[n:] == -1).all()
    assert torch.equal(padded.token_ids[:n], microbatch.token_ids)
    assert pad_microbatch(scored, n) is scored
