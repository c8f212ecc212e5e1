"""A rank's CPU threads: its share of the cores, or what the configuration says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_rest.config import load
from megatron_rest.rollout.process import cpu_share
from megatron_rest.trainer.setup import set_threads


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "threads"), [(0, cpu_share()), (1, 1), (3, 3)])
def test_threads_are_those_of_the_configuration_or_the_share(given: int, threads: int) -> None:
    assert set_threads(load(None, [f"trainer.threads={given}"])) == threads == torch.get_num_threads()
