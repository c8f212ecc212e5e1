"""Group-relative advantages against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_rest.algorithms import group_relative_advantages
from megatron_rest.config import AdvantageEstimator


def test_golden() -> None:
    rewards = torch.tensor([4.0, 1.0, 1.0, -2.0], dtype=torch.float64)
    grpo = group_relative_advantages(rewards)
    torch.testing.assert_close(grpo, torch.tensor([1.224744, 0, 0, -1.224744]).double(), atol=1e-6, rtol=0)
    assert group_relative_advantages(rewards, estimator=AdvantageEstimator.DR_GRPO).tolist() == [3, 0, 0, -3]


@pytest.mark.parametrize("estimator", list(AdvantageEstimator))
@pytest.mark.parametrize("value", [0.0, 0.1, -2.7, 1e9])
def test_a_constant_group_is_exactly_zero(estimator: AdvantageEstimator, value: float) -> None:
    assert (group_relative_advantages(np.full((2, 7), value), estimator=estimator) == 0).all()


def test_groups_are_independent_rows_and_kinds_are_kept() -> None:
    rewards = np.array([[1.0, 2.0, 4.0], [5.0, 5.0, 5.0]], dtype=np.float32)
    both = group_relative_advantages(rewards)
    assert both.dtype == np.float32
    np.testing.assert_array_equal(both[0], group_relative_advantages(rewards[0]))
    assert both[0].sum() == pytest.approx(0, abs=1e-6)
    assert np.std(both[0], ddof=1) == pytest.approx(1.0, abs=1e-5)
    as_torch = group_relative_advantages(torch.from_numpy(rewards))
    assert as_torch.dtype == torch.float32
    np.testing.assert_array_equal(as_torch.numpy(), both)
    assert group_relative_advantages([1, 2, 3]).dtype == np.float64


def test_a_group_of_one() -> None:
    assert group_relative_advantages([[3.0]])[0, 0] == pytest.approx(3.0, abs=1e-5)
    assert group_relative_advantages([3.0], estimator="dr_grpo").tolist() == [3.0]


@pytest.mark.parametrize("rewards", [[], [[[1.0]]], 1.0, [1.0, float("nan")], [float("inf"), 0.0]])
def test_bad_rewards_raise(rewards: object) -> None:
    with pytest.raises(ValueError, match="reward"):
        group_relative_advantages(rewards)


def test_an_unknown_estimator_raises() -> None:
    with pytest.raises(ValueError, match="Estimator"):
        group_relative_advantages([1.0, 2.0], estimator="gae")
