"""The zigzag: every token on one rank, every rank the same work, all fields cut alike."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rest.config import ConfigError, load, validate
from megatron_rest.data.alignment import PackingAlignment
from megatron_rest.data.batching import make_microbatch
from megatron_rest.mcore.context_parallel import shard, zigzag_order
from tests.helpers.policies import random_samples

_OF_THE_WHOLE = {"cu_seqlens", "bounds", "parents", "cp_size", "active_rows", "left_out_tokens"}  # not of rows


def test_zigzag_by_hand():
    assert zigzag_order(torch.tensor([8]), 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert zigzag_order(torch.tensor([4, 8]), 2).tolist() == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]
    assert zigzag_order(torch.tensor([3, 2]), 1).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="pad each to a multiple of 4"):
        zigzag_order(torch.tensor([8, 6]), 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([2, 3, 4]))
def test_every_rank_has_its_two_chunks_of_every_sequence(chunks, cp_size):
    lengths = torch.tensor(chunks) * 2 * cp_size
    order = zigzag_order(lengths, cp_size)
    assert sorted(order.flatten().tolist()) == list(range(int(lengths.sum())))
    pairs = 0
    for rank, mine in enumerate(order.tolist()):
        expected, start = [], 0
        for size, length in zip(chunks, lengths.tolist(), strict=True):
            for number in (rank, 2 * cp_size - 1 - rank):
                expected += range(start + number * size, start + (number + 1) * size)
            start += length
        assert mine == expected
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        work = sum(p - int(starts[p]) + 1 for p in mine)  # keys that a causal query sees
        pairs = pairs or work
        assert work == pairs, "all ranks attend equally much"


def test_all_fields_are_cut_alike():
    alignment = PackingAlignment(sequence=4, total=8)
    whole = make_microbatch(random_samples(100, count=5), alignment=alignment)
    whole = whole.with_scores(
        old_log_probs=torch.rand(len(whole.token_ids)),
        token_weights=whole.loss_mask.float(),
        ref_log_probs=torch.rand(len(whole.token_ids)),
    )
    order = zigzag_order(whole.cu_seqlens.diff(), 2)
    assert shard(whole, cp_rank=0, cp_size=1) is whole
    for rank in (0, 1):
        part = shard(whole, cp_rank=rank, cp_size=2)
        assert torch.equal(part.cu_seqlens, whole.cu_seqlens)
        for name in {f.name for f in fields(whole)} - _OF_THE_WHOLE:
            assert torch.equal(getattr(part, name), getattr(whole, name)[order[rank]]), name
        assert part.to("cpu").cp_size == 2
    with pytest.raises(ValueError, match="cu_seqlens ends at"):
        replace(part, cp_size=1)


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (("loss.aggregation=reference_code",), 2, "loss.aggregation=reference_code"),
        (("loss.tis_cap=2.0", "loss.tis_level=sequence"), 2, "loss.tis_level=sequence"),
        (("parallel.expert_parallel=3",), 4, r"expert_parallel 3 does not divide the 4 ranks of a pipeline stage"),
    ],
)
def test_what_cannot_be_split_is_refused_at_start(overrides, world_size, words):
    config = load(overrides=("parallel.context_parallel=2", *overrides))
    with pytest.raises(ConfigError, match=words):
        validate(config, world_size=world_size)
