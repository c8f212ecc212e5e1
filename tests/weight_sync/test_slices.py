"""Plans carried out by real gloo ranks: exact slices, exactly the planned bytes, faults found and named."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rest.model_map import ModelShape, parameter_map
from megatron_rest.rollout.engine import EngineLostError
from megatron_rest.weight_sync.layouts import EngineTensor, engine_tensors, engine_workers, training_shards
from megatron_rest.weight_sync.links import GlooLink, Lanes
from megatron_rest.weight_sync.plan import make_plan, make_plans
from megatron_rest.weight_sync.sliced import SliceTransport
from megatron_rest.weight_sync.slices import Schedule, SliceReceiver, SliceSender, message_names
from megatron_rest.weight_sync.source import MegatronWeightSource
from tests.helpers.distributed import run_distributed
from tests.weight_sync.test_plan import (
    EngineLayout,
    TrainingLayout,
    _dense,
    full_state,
    loaded_by_vllm,
    random_case,
    shards_of,
)
from tests.weight_sync.test_sliced import layout_of


def take_part(rank: int, shape: ModelShape, training: TrainingLayout, engines: list[EngineLayout], fault: str) -> Any:
    """Ranks: sources, then the workers of each engine.  Every worker compares what it got with what vLLM would load."""
    held = training_shards(shape, training)
    workers = [engine_workers(shape, engine) for engine in engines]
    sides = [[engine_tensors(shape, worker, torch.bfloat16) for worker in layouts] for layouts in workers]
    plans = make_plans(shape, held, [(side, None) for side in sides], message_bytes=3000)
    state = {name: (tensor % 509 + 1).to(torch.bfloat16) for name, tensor in full_state(shape).items()}
    if rank < len(held):
        links = []
        for engine in range(len(workers)):
            offset = sum(len(w) for w in workers[:engine])
            sources = plans[engine].sources
            ranks = [*sources, *(len(held) + offset + worker for worker in range(len(workers[engine])))]
            links.append(_Numbered(ranks) if rank in sources else None)
        sender = SliceSender(rank, plans, links, torch.device("cpu"))
        # fp32 masters: the cast to bfloat16 happens on the way
        shards = {name: t.float() for name, t in shards_of(shape, state, held[rank]).items()}
        flip = _flip(fault) if fault and rank == 0 else None
        digests = [sender.send([shards] * len(plans), detailed=detailed, tamper=flip) for detailed in (False, True)]
        assert sender.num_bytes == sum(plan.sent_by[rank] for plan in plans)
        return digests
    index = rank - len(held)
    engine, worker = next(
        (e, index - sum(len(w) for w in workers[:e]))
        for e in range(len(workers))
        if index < sum(len(w) for w in workers[: e + 1])
    )
    got: dict[str, torch.Tensor] = {}
    schedule = Schedule.from_json(Schedule.of(plans[engine], worker).to_json())
    receiver = SliceReceiver(
        _Numbered(plans[engine].sources),
        schedule,
        torch.device("cpu"),
        lambda name, tensor, _: got.update({name: tensor}),
    )
    digests = [receiver.receive(detailed=detailed) for detailed in (False, True)]
    assert receiver.num_bytes == plans[engine].received_by()[worker]
    if not fault:
        wanted = loaded_by_vllm(shape, state, workers[engine][worker])
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            expected = torch.where(tensor == -1, 0, tensor)  # padding
            assert torch.equal(got[name], expected.to(torch.bfloat16)), name
    return [(engine, position) for position, m in enumerate(plans[engine].messages) if m.worker == worker], digests


class _Numbered(GlooLink):
    """All engines share the test's default group: ``ranks`` has the numbers there of those in an engine's group."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(dist.group.WORLD)
        self._ranks = ranks

    def send(self, data: torch.Tensor, rank: int) -> Any:
        return super().send(data, self._ranks[rank])

    def receive(self, buffer: torch.Tensor, rank: int) -> Any:
        return super().receive(buffer, self._ranks[rank])


def _flip(name: str) -> Any:
    def tamper(tensor_name: str, part: torch.Tensor) -> torch.Tensor:
        if tensor_name != name:
            return part
        broken = part.clone()
        broken.view(-1).view(torch.uint8)[3] ^= 0x40
        return broken

    return tamper


CASES = [(random_case(random.Random(seed))[:2], seed) for seed in range(60)]


def four_ranks(rank: int, world: int) -> str:
    """Every case that fits two sources and two workers, and a fault in one of them; one set of processes for all."""
    count = 0
    for (shape, training), seed in CASES:
        if training.num_ranks != 2:
            continue
        engines = [EngineLayout(tensor_parallel=2, expert_parallel=seed % 2 == 0)] if seed % 3 else [EngineLayout()] * 2
        take_part(rank, shape, training, engines, "")
        count += 1
    assert count >= 5
    (shape, training), _ = next(case for case in CASES if case[0][1].num_ranks == 2)
    fault = "model.layers.1.self_attn.qkv_proj.weight"
    engines = [EngineLayout(tensor_parallel=2)]
    mine = take_part(rank, shape, training, engines, fault)
    results: list[Any] = [None] * world
    dist.all_gather_object(results, mine)
    if rank == 0:
        _check_fault(shape, training, engines, results, fault)
    _check_lost_while_connecting(rank, world)
    return "exact"


def _check_lost_while_connecting(rank: int, world: int) -> None:
    """Rank 1's engine goes before its workers join the group: all ranks hear of it, long before the timeout."""
    shape, training = _dense(), TrainingLayout(tensor_parallel=world)
    held = training_shards(shape, training)[rank]
    shards = shards_of(shape, full_state(shape), held)
    source = MegatronWeightSource(lambda: shards, parameter_map(shape), shape, tp_group=dist.group.WORLD)
    transport = SliceTransport(source, message_bytes=3000, timeout_seconds=10**4)
    engine: Any = _Dying(shape) if rank == 1 else None
    with pytest.raises(ConnectionError, match="did not meet") as caught:
        transport.connect(engine)
    reason = "engine process 7 ended (signal SIGKILL)" if rank == 1 else "another rank reported a fault"
    assert reason in str(caught.value)
    assert dist.get_rank() == rank and source.worst_of_ranks(rank) == world - 1, "the ranks still agree"


class _Dying:
    """Stands for an engine process that is killed while it connects (its handle raises EngineLostError then)."""

    def __init__(self, shape: ModelShape) -> None:
        self._layout = layout_of(shape, EngineLayout(tensor_parallel=2))

    def weight_layout(self) -> list[dict[str, Any]]:
        return self._layout

    def init_weight_transfer(self, info: dict[str, Any]) -> None:
        assert info["timeout_seconds"] == 10**4
        time.sleep(0.5)
        raise EngineLostError("engine process 7 ended (signal SIGKILL)")


def _check_fault(shape: ModelShape, training: TrainingLayout, engines: Any, results: list[Any], fault: str) -> None:
    held = training_shards(shape, training)
    tensors = [engine_tensors(shape, worker, torch.bfloat16) for worker in engine_workers(shape, engines[0])]
    plan = make_plan(shape, held, tensors, message_bytes=3000)
    for detailed in (0, 1):
        sent = {key: value for source in results[:2] for key, value in source[detailed].items()}
        wrong: set[str] = set()
        for keys, received in results[2:]:
            for key, value in zip(keys, received[detailed], strict=True):
                message = plan.messages[key[1]]
                if detailed:
                    for copy, a, b in zip(message.copies, sent[key][1:], value[1:], strict=True):
                        wrong |= {plan.tensors[message.worker][copy.tensor].name} if a != b else set()
                elif sent[key] != value:
                    wrong |= set(message_names(plan, message))
        assert fault in wrong and (len(wrong) == 1 or not detailed)


@pytest.mark.slow
def test_four_ranks() -> None:
    assert run_distributed(four_ranks, 4) == ["exact"] * 4


def test_engine_failure_does_not_stop_the_senders() -> None:
    shape, training, _ = random_case(random.Random(3))
    held = training_shards(shape, training)
    tensors: list[EngineTensor] = engine_tensors(shape, engine_workers(shape, EngineLayout())[0], torch.float32)
    plan = make_plan(shape, held, [tensors], message_bytes=100)
    taken = []

    class Canned:
        def send(self, data: torch.Tensor, rank: int) -> Any:
            raise AssertionError("a worker sends nothing")

        def receive(self, buffer: torch.Tensor, rank: int) -> Any:
            taken.append(buffer.numel())
            return type("Done", (), {"wait": lambda self: None})()

    def fails(name: str, tensor: torch.Tensor, is_whole: bool) -> None:
        raise MemoryError(f"no room for {name}")

    receiver = SliceReceiver(Canned(), Schedule.of(plan, 0), torch.device("cpu"), fails)
    with pytest.raises(MemoryError, match="no room for model"):
        receiver.receive()
    assert sum(taken) == plan.moved_bytes


def test_a_lost_engine_does_not_keep_the_others_waiting() -> None:
    shape, _, _ = random_case(random.Random(3))
    held = training_shards(shape, TrainingLayout())
    tensors = engine_tensors(shape, engine_workers(shape, EngineLayout())[0], torch.float32)
    plan = make_plan(shape, held, [tensors], message_bytes=100)
    assert len(plan.messages) > 4
    sent: list[int] = []

    class Engine:
        """Takes everything, or breaks: as it is handed a message, or while the message is under way."""

        def __init__(self, breaks: str) -> None:
            self._breaks, self._count = breaks, 0

        def send(self, data: torch.Tensor, rank: int) -> Any:
            self._count += 1
            if self._breaks == "send" and self._count == 3:
                raise RuntimeError("connection closed by peer")
            sent.append(data.numel() if not self._breaks else 0)
            return self

        def wait(self) -> None:
            if self._breaks == "wait" and self._count >= 3:
                raise RuntimeError("connection closed by peer")

    for breaks in ("send", "wait"):
        sent.clear()
        links: list[Any] = [Engine(breaks), Engine("")]
        sender = SliceSender(0, [plan, plan], links, torch.device("cpu"))
        state = shards_of(shape, full_state(shape), held[0])
        sender.send([{name: t.float() for name, t in state.items()}] * 2)
        assert list(sender.broken) == [0] and "connection closed by peer" in str(sender.broken[0])
        assert sum(sent) == plan.moved_bytes


def test_one_lane_more_for_every_peer_and_message() -> None:
    """Both ends choose the same lane, and neither those a rank sends to nor those it hears of share one."""
    sources, workers, count = range(8), range(8, 16), 4
    lanes = {rank: Lanes(rank, count) for rank in (*sources, *workers)}
    for _ in range(3):
        chosen = {(source, worker): lanes[source].next(worker) for source in sources for worker in workers}
        assert chosen == {(source, worker): lanes[worker].next(source) for source, worker in chosen}
        for four in (range(4), range(4, 8)):
            assert {chosen[source, 8] for source in four} == {chosen[0, 8 + i] for i in four} == set(range(count))
