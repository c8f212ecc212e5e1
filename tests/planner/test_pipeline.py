"""Megatron's schedules as events: known times of even microbatches, and what an uneven one costs."""

from __future__ import annotations

import pytest

from megatron_rest.planner.pipeline import pipeline_seconds


@pytest.mark.parametrize(("stages", "count"), [(1, 3), (2, 4), (4, 8), (4, 32)])
def test_even_microbatches_take_work_and_the_bubble_that_is_published(stages: int, count: int) -> None:
    """1F1B: (m + p - 1) (forward + backward) of a stage (Narayanan et al. 2021, equation for the bubble)."""
    assert pipeline_seconds([1.0] * count, stages=stages) == pytest.approx((count + stages - 1) * 3 / stages)


@pytest.mark.parametrize(("stages", "chunks", "count"), [(2, 2, 4), (4, 5, 8), (4, 2, 32)])
def test_virtual_stages_divide_the_bubble(stages: int, chunks: int, count: int) -> None:
    seconds = pipeline_seconds([1.0] * count, stages=stages, chunks=chunks)
    assert seconds == pytest.approx((count + (stages - 1) / chunks) * 3 / stages)


def test_one_large_microbatch_holds_all_stages_up() -> None:
    even, uneven = [1.0] * 8, [0.5, 4.5, *[0.5] * 6]
    assert sum(uneven) == sum(even)
    assert pipeline_seconds(uneven, stages=4) > 1.3 * pipeline_seconds(even, stages=4)
    with pytest.raises(ValueError, match="6 microbatches are no multiple of 4 stages"):
        pipeline_seconds([1.0] * 6, stages=4, chunks=2)
