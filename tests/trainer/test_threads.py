"""A rank's CPU threads: its share of the cores, or what the configuration says."""

from __future__ import annotations

import torch

from megatron_rest.config import load
from megatron_rest.rollout.process import cpu_share
from megatron_rest.trainer.setup import set_threads
from tests.helpers.distributed import run_distributed


def settings(rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """(asked for, answered, used), in a process where no engine has fixed the number."""
    return [
        (given, set_threads(load(None, [f"trainer.threads={given}"])), torch.get_num_threads()) for given in (0, 1, 3)
    ]


def test_threads_are_those_of_the_configuration_or_the_share() -> None:
    assert run_distributed(settings, 1) == [[(0, cpu_share(), cpu_share()), (1, 1, 1), (3, 3, 3)]]
