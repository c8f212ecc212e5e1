"""The transfer as events: times that can be worked out by hand, and that windows and lanes matter as they should."""

from __future__ import annotations

import pytest

from megatron_rest.weight_sync import timing
from megatron_rest.weight_sync.layouts import EngineLayout, TrainingLayout
from megatron_rest.weight_sync.plan import Copy, Message, SyncPlan
from megatron_rest.weight_sync.rates import Rates
from megatron_rest.weight_sync.timing import simulate_transfer, transfer_seconds
from tests.weight_sync.test_plan import _dense

WIRE = Rates(nic=1.0, message=0.0, send=0.0, receive=0.0, copy=0.0)


def plan(messages: list[tuple[int, int, int]], workers: int) -> SyncPlan:
    """(source, worker, bytes)."""
    copy = Copy("p", (0,), 0, (0,), (1,))
    sent = [0] * (1 + max(source for source, _, _ in messages))
    for source, _, num_bytes in messages:
        sent[source] += num_bytes
    return SyncPlan(
        tensors=((),) * workers,
        messages=tuple(Message(source, worker, (copy,), num_bytes) for source, worker, num_bytes in messages),
        sent_by=tuple(sent),
    )


@pytest.mark.parametrize("lanes", [0, 4])
def test_cards_are_shared_and_the_most_loaded_one_decides(lanes: int) -> None:
    one_worker = plan([(0, 0, 10), (1, 0, 10)], 1)
    assert transfer_seconds([one_worker], lanes=lanes, rates=WIRE) == pytest.approx(20)
    two_workers = plan([(0, 0, 10), (1, 1, 10)], 2)
    assert transfer_seconds([two_workers], lanes=lanes, rates=WIRE) == pytest.approx(10)


def test_one_lane_carries_one_message_after_the_other() -> None:
    """Two sources for one worker: the second is done when its host has sent; one lane lets the worker wait for it."""
    late = Rates(nic=1.0, message=1.0, send=0.0, receive=0.0, copy=0.0)
    both = plan([(0, 0, 10), (1, 0, 10)], 1)
    assert transfer_seconds([both], lanes=0, rates=late) == pytest.approx(21)  # both have begun at once
    assert transfer_seconds([both], lanes=1, rates=late) == pytest.approx(22)


def test_a_narrow_window_leaves_cards_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that send to two workers each, one of them twice as much."""
    messages = [(s, w, 4 if s == w else 1) for _ in range(8) for s in range(4) for w in range(4)]
    slow = Rates(nic=1.0, message=1.0, send=0.0, receive=0.5, copy=0.0)
    wide = transfer_seconds([plan(messages, 4)], lanes=0, rates=slow)
    monkeypatch.setattr(timing, "MESSAGES_UNDER_WAY", 1)
    assert transfer_seconds([plan(messages, 4)], lanes=0, rates=slow) > 1.2 * wide


def test_a_small_job_from_its_layouts() -> None:
    found = simulate_transfer(
        _dense(), TrainingLayout(tensor_parallel=2, pipeline_parallel=2, data_parallel=2),
        EngineLayout(tensor_parallel=2), 2, message_bytes=3000,
    )  # fmt: skip
    assert found.moved == found.needed
    assert 0 < found.share <= 1
    assert found.ranks_of_a_group == 4 + 2, "one copy of the model for each engine"
    assert found.groups_of_a_rank == 1
