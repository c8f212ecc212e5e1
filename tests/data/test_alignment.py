"""Every local shard of every layout is a multiple of the recipe's block; nothing smaller would do."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rest.config import Fp8Recipe, ParallelConfig
from megatron_rest.data.alignment import TOKEN_BLOCK, packing_alignment
from megatron_rest.data.batching import make_microbatch
from tests.helpers.policies import random_samples

recipes = st.sampled_from(list(Fp8Recipe))
layouts = st.builds(
    lambda tp, cp, sp: ParallelConfig(tensor_parallel=tp, context_parallel=cp, sequence_parallel=sp and tp > 1),
    tp=st.sampled_from([1, 2, 3, 4, 6, 8]),
    cp=st.sampled_from([1, 2, 3, 4, 8]),
    sp=st.booleans(),
)


def local_shards(lengths: list[int], parallel: ParallelConfig) -> list[int]:
    """Tokens of each shard that is quantised: sequences dealt out over CP chunk by chunk, then cut over TP."""
    context = parallel.context_parallel
    held = [0] * context
    for length in lengths:
        chunk, rest = divmod(length, 2 * context if context > 1 else 1)
        assert rest == 0, "a sequence does not split into equal chunks"
        for rank in range(context):  # rank r takes chunks r and 2 CP - 1 - r
            held[rank] += 2 * chunk if context > 1 else chunk
    cuts = parallel.tensor_parallel if parallel.sequence_parallel else 1
    assert all(tokens % cuts == 0 for tokens in held)
    return [tokens // cuts for tokens in held]


@settings(max_examples=300, deadline=None)
@given(recipes, layouts, st.lists(st.integers(1, 5000), min_size=1, max_size=8))
def test_every_local_shard_is_a_multiple_of_the_block(recipe, parallel, lengths):
    alignment = packing_alignment(recipe, parallel)
    padded = [-(-n // alignment.sequence) * alignment.sequence for n in lengths]
    fill = -sum(padded) % alignment.total
    packed = [*padded, *([fill] if fill else [])]
    assert all(shard % TOKEN_BLOCK[recipe] == 0 for shard in local_shards(packed, parallel))


@settings(max_examples=100, deadline=None)
@given(recipes, layouts)
def test_nothing_smaller_would_do(recipe, parallel):
    alignment = packing_alignment(recipe, parallel)
    cuts = parallel.context_parallel * (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    chunks = 2 * parallel.context_parallel if parallel.context_parallel > 1 else 1

    def holds(sequence: int, total: int) -> bool:
        return sequence % chunks == 0 and total % sequence == 0 and total % (cuts * TOKEN_BLOCK[recipe]) == 0

    assert holds(alignment.sequence, alignment.total)
    assert not any(holds(alignment.sequence, t) for t in range(1, alignment.total))
    assert not any(holds(s, alignment.total) for s in range(1, alignment.sequence))


def test_known_values():
    parallel = ParallelConfig(tensor_parallel=4, context_parallel=2, sequence_parallel=True)
    totals = {str(recipe): packing_alignment(recipe, parallel).total for recipe in Fp8Recipe}
    assert totals == {"none": 8, "delayed": 128, "tensorwise": 128, "mxfp8": 256, "blockwise": 1024}
    without = ParallelConfig(tensor_parallel=4)
    assert packing_alignment(Fp8Recipe.BLOCKWISE, without).total == 128  # no sequence parallelism: TP sees all tokens
    assert packing_alignment(Fp8Recipe.NONE, without).total == 1


@settings(max_examples=60, deadline=None)
@given(recipes, layouts, st.integers(0, 12), st.integers(0, 99))
def test_packed_microbatches_have_that_length(recipe, parallel, count, seed):
    alignment = packing_alignment(recipe, parallel)
    microbatch = make_microbatch(random_samples(64, count=count, seed=seed), alignment=alignment)
    assert len(microbatch.token_ids) % alignment.total == 0
    assert len(microbatch.token_ids) > 0
    assert int(microbatch.cu_seqlens[-1]) == len(microbatch.token_ids)
    assert np.all(np.diff(microbatch.cu_seqlens.numpy()) > 0)
    assert np.all(np.diff(microbatch.cu_seqlens.numpy()) % alignment.sequence == 0)
