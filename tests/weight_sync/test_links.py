"""A link over NCCL waits for nobody for ever.

No GPU here: the communicator and the stream are fakes that stall as NCCL does when a peer is lost, in the kernel or in
the call.  What is tested is ours: deadline, news of a loss, abort, and that other engines get all of theirs.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rest.network import listen
from megatron_rest.weight_sync.layouts import (
    EngineLayout,
    TrainingLayout,
    engine_tensors,
    engine_workers,
    training_shards,
)
from megatron_rest.weight_sync.links import NcclLink, open_link
from megatron_rest.weight_sync.plan import make_plan
from megatron_rest.weight_sync.slices import SliceSender
from tests.helpers.distributed import run_distributed
from tests.weight_sync.test_plan import _dense, full_state, shards_of

CPU = torch.device("cpu")
LONG = 600.0


class FakeStallingCommunicator:
    """Nothing that it is asked for is ever done, until it is aborted: then everything looks done."""

    def __init__(self, *, in_the_call: bool = False, works_for: int = 0) -> None:
        self.aborted = threading.Event()
        self.in_the_call, self.works_for = in_the_call, works_for
        self.asked = 0

    def send(self, data: torch.Tensor, rank: int, stream: Any) -> None:
        self.asked += 1
        if self.in_the_call and self.asked > self.works_for:
            assert self.aborted.wait(60), "nobody has aborted"
            raise RuntimeError("NCCL error: remote process exited or there was a network error")

    recv = send

    def destroy(self) -> None:
        self.aborted.set()


class FakeQueue:
    """A stream whose events are done when the communicator did what it was asked for, or was aborted."""

    def __init__(self, communicator: FakeStallingCommunicator) -> None:
        self._communicator = communicator

    def put(self, transfer: Callable[[Any], None], data: torch.Tensor) -> FakeEvent:
        transfer(self)
        return FakeEvent(self._communicator, self._communicator.asked)


class FakeEvent:
    def __init__(self, communicator: FakeStallingCommunicator, number: int) -> None:
        self._communicator, self._number = communicator, number

    def query(self) -> bool:
        return self._number <= self._communicator.works_for or self._communicator.aborted.is_set()


def link_of(communicator: FakeStallingCommunicator, store: dist.Store | None = None, seconds: float = LONG) -> NcclLink:
    queue: Any = FakeQueue(communicator)
    return NcclLink([communicator], 0, CPU, store or dist.HashStore(), timeout_seconds=seconds, queues=[queue])


@pytest.mark.parametrize("in_the_call", [False, True], ids=["in the kernel", "in the call"])
def test_a_transfer_that_does_not_end_is_aborted(in_the_call: bool) -> None:
    communicator = FakeStallingCommunicator(in_the_call=in_the_call)
    link = link_of(communicator, seconds=0.2)
    with pytest.raises(ConnectionError, match=r"a transfer over NCCL was not done after 0\.2 s"):
        link.receive(torch.zeros(4, dtype=torch.uint8), 0).wait()
    assert communicator.aborted.is_set()
    with pytest.raises(ConnectionError, match="was not done after"):
        link.send(torch.zeros(4, dtype=torch.uint8), 0)


def test_a_loss_that_one_end_knows_of_ends_the_waits_of_all() -> None:
    store = dist.HashStore()
    owner, other = (link_of(FakeStallingCommunicator(), store) for _ in range(2))
    work = other.send(torch.zeros(4, dtype=torch.uint8), 0)
    owner.give_up("the engine is lost: signal SIGKILL")
    for link, waits in ((other, work), (owner, None)):
        with pytest.raises(ConnectionError, match="the engine is lost: signal SIGKILL"):
            if waits is not None:
                waits.wait()
            assert link._is_over.wait(60)
            link.send(torch.zeros(4, dtype=torch.uint8), 0)


def test_what_is_done_is_done_and_an_idle_link_is_left_alone() -> None:
    communicator = FakeStallingCommunicator(works_for=3)
    link = link_of(communicator, seconds=0.2)
    for _ in range(3):
        link.send(torch.zeros(4, dtype=torch.uint8), 0).wait()
    assert not communicator.aborted.wait(1.0), "nothing is under way"
    link.close()
    assert communicator.aborted.is_set()


def test_engines_whose_link_holds_get_all_of_theirs() -> None:
    shape = _dense()
    held = training_shards(shape, TrainingLayout())
    tensors = [engine_tensors(shape, worker, torch.bfloat16) for worker in engine_workers(shape, EngineLayout())]
    plans = [make_plan(shape, held, tensors, message_bytes=1000) for _ in range(2)]
    count = len(plans[0].messages)
    assert count > 5
    lost, fine = FakeStallingCommunicator(works_for=2), FakeStallingCommunicator(works_for=count)
    sender = SliceSender(0, plans, [link_of(lost, seconds=0.2), link_of(fine)], CPU)
    shards = {name: t.to(torch.bfloat16) for name, t in shards_of(shape, full_state(shape), held[0]).items()}
    digests = sender.send([shards, shards])
    assert set(sender.broken) == {0} and "was not done after" in str(sender.broken[0])
    assert fine.asked == count and sum(engine == 1 for engine, _ in digests) == count
    assert lost.asked < count, "the lost one gets nothing more"


def lazy_and_not(rank: int, world_size: int, address: tuple[str, int]) -> list[int]:
    """Ends of a link whose environments differ, as a trainer's and that of an engine on another machine do."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(1 - rank)
    listener = listen(*address) if rank == 0 else None
    link = open_link("gloo", *address, rank, world_size, 60, CPU, "token", None, listener)
    data = torch.arange(5, dtype=torch.uint8) if rank == 0 else torch.zeros(5, dtype=torch.uint8)
    work = link.send(data, 1) if rank == 0 else link.receive(data, 0)
    work.wait()
    return data.tolist()


def test_ends_of_a_gloo_link_need_not_have_the_same_environment() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    assert run_distributed(lazy_and_not, 2, address) == [[0, 1, 2, 3, 4]] * 2
