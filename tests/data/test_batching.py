"""Packing: every loss token appears once, shifted once, with its sequence's numbers, however the work is split."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rest.data.alignment import PackingAlignment
from megatron_rest.data.batching import make_microbatch, make_train_batch, pack
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


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_pack_is_a_partition_within_the_limit(lengths):
    bins = pack(lengths, 50)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 50 for b in bins)
    if len(bins) > 1:  # first fit: any two bins together overflow one
        loads = sorted(sum(lengths[i] for i in b) for b in bins)
        assert loads[0] + loads[1] > 50
