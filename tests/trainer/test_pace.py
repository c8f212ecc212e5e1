"""The slow rank is named with its node, once it has been slow for several steps; ranks that are alike are not."""

from __future__ import annotations

import logging
import socket

import torch

from megatron_rest.trainer import pace
from megatron_rest.trainer.pace import Pace, Straggler
from tests.helpers.distributed import run_distributed


def test_a_rank_is_named_after_several_slow_steps_and_not_at_each() -> None:
    straggler = Straggler(0.5)
    named = [straggler.take([1.0, 1.1, slow, 0.9]) for slow in (9.0, 9.0, 1.0, 9.0, 9.0, 3.0, 9.0)]
    assert named == [{}, {}, {}, {}, {}, {2: 3.0}, {}]
    assert [straggler.take([0.02, 0.15]) for _ in range(4)] == [{}] * 4, "nobody feels a tenth of a second"
    assert [straggler.take([0.02, 0.55]) for _ in range(3)][-1].keys() == {1}
    long = Straggler(0.5)
    assert [i for i in range(60) if long.take([1.0, 1.0, 5.0])] == [2, 52]


def slow_rank(rank: int, world_size: int) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(pace.__name__).addHandler(handler)
    ranks = Pace(rank=rank, world_size=world_size, device=torch.device("cpu"))
    for step in range(1, 5):
        # Judging is told, so that a busy machine decides nothing here; the product is really measured.
        ranks.compare(step, judging_seconds=4.0 if rank == 2 else 1.0)
    assert 0 < ranks._probe() < 30
    return [text for text in said if "judging" in text]


def test_the_slow_rank_is_named() -> None:
    named, *others = run_distributed(slow_rank, 3)
    assert named == [
        f"step 3: rank 2 on {socket.gethostname()} is slow, and all ranks with it: judging takes 4 s there, 4.0 times "
        "as long as on the median rank, 3 steps in a row [help: hang]"
    ]
    assert others == [[], []]
