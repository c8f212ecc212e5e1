"""Every bound of ``make scale`` is missed by what the code once did, or would do if it got worse: they can fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import scale
from megatron_rest.mcore.dry import DryRank
from megatron_rest.planner.published import Point
from megatron_rest.simulate.balance import Balance
from megatron_rest.simulate.judging import Judging
from megatron_rest.simulate.start import Start
from megatron_rest.types import Rollout
from megatron_rest.weight_sync.timing import Transfer


def always(value: Any) -> Any:
    return lambda *args, **options: value


def padded_to_all_ranks(rollouts: Mapping[int, Rollout]) -> torch.Tensor:
    """Ids and masks as int64, and as much again from every rank without an engine."""
    tokens = sum(len(rollout.token_ids) for rollout in rollouts.values())
    return torch.zeros(20 * tokens * 4, dtype=torch.uint8)


def old_dry_rank(function: Any, config: Any, shape: Any, *, rank: int, world_size: int) -> DryRank:
    """The whole data-parallel group's state in host memory; a peak and parameters that nobody planned; a wait for every
    microbatch's longest sequence beside those of the rotary embedding, and four for the experts' rows.
    """
    return DryRank(
        stage=0, parameters=10**12, weights=4_500_000_000, gradients=0, optimizer=13_600_000_000,
        update=200 * 10**9, saving=27_250_000_000,
        waits={"rope_utils.py:204": 480.0, "token_dispatcher.py:1": 480.0, "forward_step.py:27": 1.0},
    )  # fmt: skip


PLANTED = [
    ("balance", "simulate_balance", always(Balance(
        share=0.75, share_with_head=0.7, microbatches=12, empty=0.3, padding=0.03, imbalance=1.0, possible=0.9)), 9),
    ("transfer", "simulate_transfer", always(Transfer(
        seconds=5.7, limit=1.179, moved=1, needed=1, imbalance=1.03, plan_seconds=49.0, messages=36845.0,
        result_bytes=962 * 10**6, ranks_of_a_group=1032, groups_of_a_rank=32)), 16),
    ("judging", "simulate_judging", always(Judging(
        reading=150.0, share=1 / 1024, comparing=0.5, composing=3.1, trained=1.0, received=0)), 1),
    ("start", "run_apart", always(Start(made=5553, sockets=3240, members=(1024,))), 2),
    ("dry", "run_apart", old_dry_rank, 16),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name", "planted", "count"), PLANTED, ids=[p[0] for p in PLANTED])
def test_the_old_behaviour_misses_every_bound(
    part: str, name: str, planted: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, name, planted)
    bounded = [f for f in scale.PARTS[part]() if f.bound is not None]
    assert len(bounded) == count
    assert [f.name for f in bounded if f.is_reached] == []


def test_rollouts_padded_to_all_ranks_miss_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rest.simulate.exchange.pack_rollouts", padded_to_all_ranks)
    [found] = scale.exchange()
    assert found.bound == 1.5 and not found.is_reached


@pytest.mark.parametrize("ratio", [0.28, 6.5])
def test_a_plan_far_from_what_was_published_misses_the_bound(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Point, "ratio", always(ratio))
    found = list(scale.honesty())
    assert len(found) == 14 and not any(f.is_reached for f in found)


def test_a_missed_bound_is_said_last_and_a_lost_one_fails() -> None:
    reached = scale.Finding(name="balance: a", value=92.4, unit="%", bound=92.0, at_most=False)
    missed = scale.Finding(name="balance: b", value=89.4, unit="%", bound=92.0, at_most=False)
    assert scale.worse([reached, missed], {"balance: a": 92.5, "balance: b": 89.4}) == []
    assert "1 bounds reached, 1 MISSED (balance: b)" in scale.verdict([reached, missed], [])
    lost = scale.Finding(name="balance: a", value=91.9, unit="%", bound=92.0, at_most=False)
    [line] = scale.worse([lost, missed], {"balance: a": 92.5, "balance: b": 89.4})
    assert "balance: a" in line and "misses its bound of 92" in line
    assert np.isclose(91.9 / 92.5, 1, rtol=scale.WORSE - 1), "a twentieth less alone would be no failure"
