"""What lies together: a partition within the limit, even work, shared rows there once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rest.data import packing
from megatron_rest.data.alignment import PackingAlignment
from megatron_rest.data.batching import make_train_batch
from megatron_rest.data.packing import RowCost, deal, even_bins, shared_rows
from megatron_rest.mcore.segments import ancestors
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.shapes import PUBLISHED
from megatron_rest.planner.work import forward_flops
from megatron_rest.types import MicroBatch, TrainSample

COST = RowCost(pair=1e-4, loss_row=0.2)


def sample(prompt: np.ndarray, answer: int, *, group: int = 0, number: int = 0, late: int = 0) -> TrainSample:
    """Random answer tokens; the first ``late`` of them carry no loss."""
    rng = np.random.default_rng([group, number])
    length = len(prompt) + answer
    mask = np.arange(length) >= len(prompt) + late
    return TrainSample(
        token_ids=np.concatenate([prompt, rng.integers(0, 1000, answer)]).astype(np.int32),
        loss_mask=mask,
        region_ids=mask.astype(np.int8),
        rollout_log_probs=np.zeros(length, np.float32),
        advantage=1.0,
        sequence_id=number,
        group_id=group,
    )


def step_of(groups: int, size: int, prompts: list[int], answers: list[int], seed: int = 0) -> list[TrainSample]:
    """A step with lengths drawn from ``prompts`` and ``answers``."""
    rng = np.random.default_rng(seed)
    samples: list[TrainSample] = []
    for group in range(groups):
        prompt = rng.integers(0, 1000, int(rng.choice(prompts)))
        for _ in range(size):
            samples.append(sample(prompt, int(rng.choice(answers)), group=group, number=len(samples)))
    return samples


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 9)), min_size=1, max_size=60), st.integers(1, 40))
def test_bins_are_a_partition_within_the_limit(items, num_bins):
    rows, costs = [r for r, _ in items], [c for _, c in items]
    bins = even_bins(rows, costs, num_bins=num_bins, max_rows=50)
    if bins is None:
        assert num_bins < len(items), "one item a bin always fits"
        return
    assert sorted(i for b in bins for i in b) == list(range(len(items)))
    assert all(sum(rows[i] for i in b) <= 50 for b in bins)
    assert len(items) < num_bins or all(bins), "none is empty while there are items enough"


def test_longest_first_into_the_emptiest():
    assert even_bins([9, 7, 6, 5, 4], [9, 7, 6, 5, 4], num_bins=2, max_rows=100) == [[0, 3], [1, 2, 4]]
    assert even_bins([9, 7, 6, 5, 4], [9, 7, 6, 5, 4], num_bins=2, max_rows=15) is None


def test_what_the_emptiest_has_no_room_for_is_packed_tightly():
    assert even_bins([5, 5, 4, 3, 3], [5, 5, 4, 3, 3], num_bins=2, max_rows=10) == [[0, 1], [2, 3, 4]]
    assert even_bins([9, 1, 1], [0, 0, 9], num_bins=3, max_rows=9) == [[2], [0], [1]]


@pytest.mark.parametrize(("multiple", "bins"), [(1, 2), (100, 3)])
def test_a_pipeline_takes_the_bins_whose_rounded_length_costs_least(multiple: int, bins: int):
    """Six rows of 50: two bins of 150 would be as long as 200, three of 100 are."""
    samples = [sample(np.arange(11), 40, group=i, number=i) for i in range(6)]
    replicas, report = deal(
        samples, max_rows=150, dp_size=1, multiple=1, min_bins=2, row_multiple=1, length_multiple=multiple,
        is_sharing=False, cost=COST,
    )  # fmt: skip
    assert report.num_microbatches == bins
    assert {sum(part.rows for part in parts) for parts in replicas[0]} == {300 // bins}


def test_a_few_items_for_a_few_others():
    """No item for one or none makes 12 + 12 beside 6 + 6 + 5 + 3 cheaper; one for two does."""
    rows, bins = [12, 12, 6, 6, 5, 3], [[0, 1], [2, 3, 4, 5]]
    packing._even_out(bins, rows, rows, max_rows=100)
    assert sorted(sum(rows[i] for i in items) for items in bins) == [21, 23]
    assert sorted(i for items in bins for i in items) == list(range(6))


def test_what_a_group_shares():
    prompt = np.arange(20)
    a, b = sample(prompt, 5, number=0), sample(prompt, 9, number=1)
    assert shared_rows([a]) == 0, "alone there is nobody to share with"
    assert shared_rows([a, b]) == 19, "the last prompt token predicts the answer's first: every answer has its own"
    assert shared_rows([a, b], multiple=4) == 16
    other = sample(np.where(prompt == 7, 99, prompt), 9, number=2)
    assert shared_rows([a, b, other]) == 7, "as far as the tokens agree"
    same = [sample(prompt, 6, number=0, late=k) for k in (3, 5)]
    assert shared_rows(same) == shared_rows(same[::-1]) == 22, "an answer's beginning without loss is shared, too"
    assert shared_rows([sample(np.arange(1), 4, number=n) for n in range(2)]) == 0


def rebuilt(microbatch: MicroBatch, segment: int) -> np.ndarray:
    """All tokens that a segment's last row has seen."""
    parents = tuple(microbatch.parents.tolist()) if microbatch.parents is not None else ()
    bounds, tokens = microbatch.bounds, microbatch.token_ids.numpy()
    chain = [*ancestors(parents, segment), segment]
    return np.concatenate([tokens[bounds[i] : bounds[i + 1]] for i in chain])


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(("rows", "dp_size", "least"), [(4000, 1, 1), (300, 2, 1), (300, 1, 4), (200, 3, 2)])
def test_every_answer_sees_its_whole_prompt(rows, dp_size, least, multiple):
    samples = step_of(7, 5, [30, 80, 120], [2, 9, 40])
    alignment = PackingAlignment(sequence=multiple, total=multiple)
    seen: Counter = Counter()
    for rank in range(dp_size):
        batch = make_train_batch(
            samples, max_tokens=rows, dp_rank=rank, dp_size=dp_size, alignment=alignment, min_microbatches=least,
            is_sharing=True, cost=COST,
        )  # fmt: skip
        for m in batch.microbatches:
            assert len(m.token_ids) <= rows
            owners = [int(m.sequence_ids[start:end].max()) for start, end in zip(m.bounds, m.bounds[1:], strict=False)]
            for segment, owner in enumerate(owners):
                if owner < 0:
                    continue
                whole = samples[owner].token_ids[:-1]
                assert np.array_equal(rebuilt(m, segment)[: len(whole)], whole)
                first, last = m.bounds[segment], m.bounds[segment + 1]
                own = m.position_ids[first:last]
                assert int(own[0]) == len(rebuilt(m, segment)) - (last - first), "places are those in the sequence"
                seen[owner] += 1
        assert batch.packing.rows < batch.packing.plain_rows
    assert seen == Counter(range(len(samples)))


RLLA_PROMPTS, RLLA_ANSWERS = [473, 560, 669, 820, 1084], [196, 280, 355, 430, 517, 640]


@pytest.mark.parametrize(
    ("groups", "size", "dp_size", "least", "max_rows"),
    [(64, 4, 2, 1, 8192), (64, 4, 8, 4, 8192), (64, 4, 16, 1, 8192), (16, 16, 16, 1, 8192), (8, 64, 8, 1, 16384)],
)
@pytest.mark.parametrize("is_sharing", [False, True])
def test_replicas_end_together(groups, size, dp_size, least, max_rows, is_sharing):
    """Layouts of the recipes and wider ones, lengths of tool-use data: the slowest within 5 % of the mean."""
    samples = step_of(groups, size, RLLA_PROMPTS, RLLA_ANSWERS)
    replicas, report = deal(
        samples, max_rows=max_rows, dp_size=dp_size, multiple=1, min_bins=least, row_multiple=1,
        is_sharing=is_sharing, cost=COST,
    )  # fmt: skip
    assert report.imbalance <= 1.05
    assert report.num_empty == 0
    assert {len(bins) for bins in replicas} == {report.num_microbatches}
    if least > 1:  # a pipeline is paced by its largest microbatch
        work = [sum(part.cost for part in b) for bins in replicas for b in bins]
        assert max(work) <= 1.15 * np.mean(work)


def test_interleaved_pipelines_get_a_multiple():
    samples = step_of(10, 4, RLLA_PROMPTS, RLLA_ANSWERS)
    _, report = deal(
        samples, max_rows=4096, dp_size=2, multiple=4, min_bins=8, row_multiple=1, is_sharing=True, cost=COST
    )
    assert report.num_microbatches % 4 == 0 and report.num_empty == 0
    few, report = deal(
        samples[:3], max_rows=4096, dp_size=2, multiple=4, min_bins=8, row_multiple=1, is_sharing=False, cost=COST
    )
    assert [len(bins) for bins in few] == [4, 4] and report.num_empty == 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_are_the_floating_point_operations_of_the_planner(name):
    shape = ModelShape.from_hf_config(PUBLISHED[name])
    cost = RowCost.of_shape(shape)
    rows = 1000
    ours = cost(rows, loss_rows=rows) / rows
    flops = forward_flops(shape, tokens=rows, mean_context=rows / 2)
    layers = forward_flops(shape, tokens=1, mean_context=0, head=False)
    assert ours == pytest.approx(flops / rows / layers, rel=0.02)
