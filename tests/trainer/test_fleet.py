"""Which rank has which engine, what is refused, and what follows when engines go (real ones are killed in test_run.py).

The engine and the transfer are scripted here: what is tested is who is asked for what, and when the run gives up.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rest.config import (
    ConfigError,
    LossConfig,
    OnUpdate,
    RestConfig,
    RolloutConfig,
    RolloutQuantization,
    WeightSyncConfig,
    validate,
)
from megatron_rest.rollout.engine import (
    NO_WEIGHTS,
    Cut,
    EngineLostError,
    Exam,
    MoreRequests,
    OnRollout,
    RolloutRequest,
)
from megatron_rest.trainer.fleet import Placement, engine_devices
from megatron_rest.trainer.run_state import RunState
from megatron_rest.types import PromptSample, Rollout, StopReason
from megatron_rest.weight_sync.sync import WeightSyncError
from megatron_rest.weight_sync.transport import EngineUnreachableError
from tests.helpers import stand_in
from tests.helpers.distributed import run_distributed
from tests.helpers.stand_in import StandInEngine, fleet_of


def test_engines_are_spread_over_ranks() -> None:
    assert Placement.of(RolloutConfig(), 3).owners == (0, 1, 2)
    assert Placement.of(RolloutConfig(replicas=1), 4).owners == (0,)
    assert Placement.of(RolloutConfig(replicas=2), 16).owners == (0, 8), "one a node of eight"
    assert Placement.of(RolloutConfig(replicas=3), 4).owners == (0, 1, 2)
    assert [Placement(((0,), (2,))).engine_of(rank) for rank in range(4)] == [0, None, 1, None]
    wide = Placement.of(RolloutConfig(tensor_parallel=2), 4)
    assert wide.members == ((0, 1), (2, 3)) and wide.owners == (0, 2)
    assert [wide.engine_of(rank) for rank in range(4)] == [0, 0, 1, 1]


def test_engines_take_the_gpus_behind_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: the counting is what is tested."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = RolloutConfig(replicas=4, tensor_parallel=2)
    placement = Placement.of(config, 8)  # two nodes of four ranks and eight GPUs

    def devices(index: int, ranks_per_node: int = 4) -> str | None:
        rank = placement.owners[index]
        context: Any = SimpleNamespace(device=torch.device("cuda"), rank=rank, ranks_per_node=ranks_per_node)
        return engine_devices(context, config, placement, index)

    assert [devices(i) for i in range(4)] == ["4,5", "6,7", "4,5", "6,7"]
    with pytest.raises(ConfigError, match=r"engine 0 would take GPUs 8 to 9, and its node has 8 of which .* use 8"):
        devices(0, ranks_per_node=8)
    on_cpu: Any = SimpleNamespace(device=torch.device("cpu"), rank=0, ranks_per_node=4)
    assert engine_devices(on_cpu, config, placement, 0) is None


GLOO = WeightSyncConfig(transport="gloo")
FP8 = RolloutQuantization.FP8_CHANNEL


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rollout": RolloutConfig(replicas=3), "weight_sync": GLOO}, "each needs a rank that owns it"),
        ({"rollout": RolloutConfig(tensor_parallel=3)}, "does not divide the 2 ranks"),
        ({"rollout": RolloutConfig(tensor_parallel=2, environment="bfcl")}, "their ranks must take the same steps"),
        ({"rollout": RolloutConfig(max_staleness=1)}, "needs engines in processes of their own"),
        ({"rollout": RolloutConfig(max_staleness=1, replicas=1), "weight_sync": GLOO}, "loss.tis_cap corrects: set it"),
        ({"rollout": RolloutConfig(quantization=FP8)}, "samples from a rounded policy, which loss.tis_cap corrects"),
        ({"rollout": RolloutConfig(replicas=1)}, "transport is 'local' with rollout.replicas 1.*set it to gloo"),
        ({"weight_sync": GLOO}, "transport is 'gloo' with rollout.replicas 0.*set it to local"),
    ],
)
def test_placements_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    fine = RestConfig(rollout=RolloutConfig(replicas=2, max_staleness=1), weight_sync=GLOO, loss=LossConfig(tis_cap=2))
    validate(fine, world_size=2)
    with pytest.raises(ConfigError, match=words):
        validate(replace(RestConfig(), **settings), world_size=2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_staleness": 65}, "rollout.max_staleness is 65"),
        (
            {"max_staleness": 1, "on_update": OnUpdate.KEEP},
            "none runs when new weights are there: set max_staleness to 2",
        ),
        (
            {"max_staleness": 2, "on_update": OnUpdate.KEEP, "environment": "bfcl"},
            "cannot be cut with them: set on_upd",
        ),
        ({"sleep_level": 3}, "vLLM has 1 and 2"),
        ({"sleep_level": 1, "replicas": 1}, "set one of them to 0"),
        ({"engine_timeout_seconds": 0}, "expected a finite number > 0"),
        ({"max_turns": 0}, "expected at least 1"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RolloutConfig(**values)


class ScriptedEngine(StandInEngine):
    """Dies during run after so many rollouts, as the script says; None = does not.

    ``gate`` is called before each rollout, ``start`` by each process that starts.
    """

    def __init__(
        self,
        deaths: Sequence[int | None] = (),
        gate: Callable[[int], object] = lambda life: None,
        start: Callable[[int], object] = lambda life: None,
    ) -> None:
        super().__init__()
        self.deaths = list(deaths)
        self.gate, self.start = gate, start
        self.asked: list[list[int]] = []  # keys, by run
        self.exams: list[Exam | None] = []

    def wait_ready(self) -> None:
        self.start(self.num_restarts)

    def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_tokens: int,
        on_rollout: OnRollout,
        exam: Exam | None = None,
        more: MoreRequests | None = None,
    ) -> None:
        assert self.alive and self.policy_version != NO_WEIGHTS
        self.exams.append(exam)
        mine, keys = list(requests), [r.key for r in requests]
        self.asked.append(keys)
        death = self.deaths.pop(0) if self.deaths else None
        count = 0
        while mine:
            if count == death:
                self.alive = False
                raise EngineLostError("scripted")
            self.gate(self.num_restarts)
            request = mine.pop()  # they end in any order
            count += 1
            on_rollout(request.key, scripted_rollout(request, self.policy_version))
            new = (more() if more is not None else None) or ()
            mine += new
            keys += [r.key for r in new]


def scripted_rollout(request: RolloutRequest, version: int) -> Rollout:
    return Rollout(
        prompt_id=request.prompt.prompt_id,
        token_ids=np.array([request.seed % 1000], np.int32),
        log_probs=np.zeros(1, np.float32),
        loss_mask=np.ones(1, bool),
        stop_reason=StopReason.EOS,
        policy_version=version,
    )


class ScriptedSync:
    """Each push does the next thing of the script, then succeeds."""

    def __init__(self, engine: ScriptedEngine | None, script: list[str]) -> None:
        self.engine, self.script = engine, script

    def push(self, version: int) -> Any:
        match self.script.pop(0) if self.script else "fine":
            case "killed":
                self.engine.alive = False
                raise WeightSyncError("scripted") from EngineLostError("scripted")
            case "broken":
                raise WeightSyncError("the engine raised") from RuntimeError("half loaded")
            case "link":
                raise WeightSyncError("the link broke", engines=[0])
            case "bytes differ":
                raise WeightSyncError("bytes differ")
        if self.engine is not None:
            self.engine.policy_version = version
        return SimpleNamespace(version=version)

    def close(self) -> None: ...


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_fleet(
    engine: ScriptedEngine,
    script: Sequence[str] = (),
    *,
    restarts: int = 2,
    rank: int = 0,
    ranks: int = 1,
    **settings: Any,
) -> Any:
    """With an engine in every rank; ``connections`` says which lives of this rank's engine transfers were made to."""
    connections: list[int | None] = []
    steps = list(script)

    def connect(is_member: bool) -> Any:
        connections.append(engine.num_restarts if is_member else None)
        if steps[:1] == ["unreachable"]:
            steps.pop(0)
            raise EngineUnreachableError("did not meet", [0])
        return ScriptedSync(engine if is_member else None, steps)

    settings |= {"rollouts_per_prompt": 2, "max_restarts": restarts}
    fleet = fleet_of(engine, connect, rank=rank, ranks=ranks, **settings)
    return SimpleNamespace(fleet=fleet, engine=engine, connections=connections, script=steps)


def give_weights(setting: Any, version: int = 0) -> None:
    stand_in.give_weights(setting.fleet, version)


def begin(setting: Any, *, seed: int) -> None:
    setting.fleet.plan(PROMPTS, seed=seed)
    setting.fleet.begin()


PROMPTS = [PromptSample(prompt_id=f"p{i % 3}", token_ids=np.zeros(1, np.int32), ground_truth="") for i in range(4)]


@pytest.mark.usefixtures("one_rank")
def test_only_what_is_missing_is_sampled_again_with_its_own_seed() -> None:
    calm = make_fleet(ScriptedEngine())
    give_weights(calm)
    begin(calm, seed=5)
    expected = calm.fleet.collect(refresh=lambda: pytest.fail("nothing was lost"))
    refreshed: list[int] = []
    setting = make_fleet(ScriptedEngine(deaths=[3, 0]))
    give_weights(setting)

    def refresh() -> None:
        refreshed.append(setting.engine.num_restarts)
        give_weights(setting, version=1)

    begin(setting, seed=5)
    groups = setting.fleet.collect(refresh)
    assert [sorted(keys) for keys in setting.engine.asked] == [list(range(8)), [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert refreshed == [1, 2] and setting.fleet.num_restarts == 2
    assert sorted(r.policy_version for g in groups for r in g.rollouts) == [0] * 3 + [1] * 5
    tokens = [[r.token_ids.tolist() for r in g.rollouts] for g in groups]
    assert tokens == [[r.token_ids.tolist() for r in g.rollouts] for g in expected]
    assert [g.prompt.prompt_id for g in groups] == ["p0", "p1", "p2", "p0"]
    assert tokens[0] != tokens[3], "the same prompt twice is answered twice"
    hopeless = make_fleet(ScriptedEngine(deaths=[0] * 9))
    give_weights(hopeless)
    begin(hopeless, seed=5)
    with pytest.raises(EngineLostError, match=r"lost 3 times in a row while sampling .rollout.max_restarts 2."):
        hopeless.fleet.collect(refresh=lambda: give_weights(hopeless))


@pytest.mark.usefixtures("one_rank")
def test_an_exam_is_one_answer_a_prompt_and_survives_a_lost_engine() -> None:
    exam = Exam(environment="bfcl", max_turns=5)
    setting = make_fleet(ScriptedEngine(deaths=[2]))
    give_weights(setting)
    refreshed: list[int] = []

    def refresh() -> None:
        refreshed.append(1)
        give_weights(setting)

    answers = setting.fleet.examine(PROMPTS, exam, max_response_tokens=9, refresh=refresh)
    assert [len(group.rollouts) for group in answers] == [1, 1, 1, 1]
    assert [group.prompt.prompt_id for group in answers] == ["p0", "p1", "p2", "p0"]
    assert [sorted(keys) for keys in setting.engine.asked] == [[0, 1, 2, 3], [0, 1]] and refreshed == [1]
    assert setting.engine.exams == [exam, exam]
    begin(setting, seed=1)
    with pytest.raises(AssertionError, match="busy"):
        setting.fleet.examine(PROMPTS, exam, max_response_tokens=9, refresh=lambda: None)
    setting.fleet.collect(refresh=lambda: None)


@pytest.mark.usefixtures("one_rank")
def test_whatever_breaks_in_a_transfer_is_replaced_and_all_is_sent_again() -> None:
    setting = make_fleet(ScriptedEngine(), ["killed", "broken", "link", "unreachable", "fine"], restarts=4)
    report, gap = setting.fleet.deliver(4, lambda singers: 0.25)
    setting.fleet.admit(4)
    assert (report.version, gap, setting.fleet.version) == (4, 0.25, 4)
    assert setting.connections == [0, 1, 2, 3, 4] and setting.fleet.num_restarts == 4

    def lost_under_the_canary(singers: Any) -> float | None:
        assert singers.engine is setting.engine and singers.has_first and singers.first_rank == 0
        if setting.engine.num_restarts == 4:
            setting.engine.alive = False
            return None
        return 0.5

    assert setting.fleet.deliver(5, lost_under_the_canary)[1] == 0.5
    assert setting.fleet.num_restarts == 5


@pytest.mark.usefixtures("one_rank")
def test_an_engine_that_ended_while_it_had_nothing_to_do_is_replaced() -> None:
    setting = make_fleet(ScriptedEngine())
    give_weights(setting)
    setting.engine.alive = False
    give_weights(setting, version=1)
    assert setting.fleet.num_restarts == 1 and setting.connections == [0, 1]


@pytest.mark.usefixtures("one_rank")
def test_what_is_no_loss_ends_the_run() -> None:
    setting = make_fleet(ScriptedEngine(), ["bytes differ"])
    with pytest.raises(WeightSyncError, match="bytes differ"):
        setting.fleet.deliver(4, lambda singers: 0.0)
    assert setting.engine.num_restarts == 0
    hopeless = make_fleet(ScriptedEngine(), ["killed"] * 9)
    with pytest.raises(EngineLostError, match="3 times in a row while taking weights of version 4"):
        hopeless.fleet.deliver(4, lambda singers: 0.0)
    refuses = make_fleet(ScriptedEngine())
    give_weights(refuses)
    refuses.engine.run = lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("prompt p0 has 9 tokens"))
    begin(refuses, seed=1)
    with pytest.raises(ValueError, match="prompt p0 has 9 tokens"):
        refuses.fleet.collect(refresh=lambda: None)


def tokens_of(groups: Sequence[Any]) -> list[list[int]]:
    return [[int(r.token_ids[0]) for r in group.rollouts] for group in groups]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def one_of_two_is_lost(rank: int, world: int, folder: str) -> tuple[Any, ...]:
    """Rank 1's engine dies after one rollout; its successor does not start before the step is over."""
    may_start, lost = threading.Event(), Path(folder) / "lost"

    def start(life: int) -> None:
        if life:
            lost.touch()
            may_start.wait(60)

    engine = ScriptedEngine([1] if rank else [], start=start, gate=lambda life: rank or wait_for(lost))
    setting = make_fleet(engine, rank=rank, ranks=world)
    give_weights(setting)
    begin(setting, seed=5)
    groups = setting.fleet.collect(refresh=lambda: pytest.fail("nobody waits for weights"))
    asked = [sorted(keys) for keys in engine.asked]
    give_weights(setting, version=1)  # without the one that still starts
    alone = setting.fleet.num_engines
    may_start.set()
    for version in range(2, 600):
        give_weights(setting, version)
        if setting.fleet.num_engines == world:
            break
        time.sleep(0.02)
    return tokens_of(groups), asked, alone, setting.connections, setting.fleet.num_restarts, engine.policy_version


def test_living_engines_do_the_work_of_a_lost_one_and_take_weights_without_it(tmp_path: Path) -> None:
    [first, second] = run_distributed(one_of_two_is_lost, 2, str(tmp_path))
    [whole] = run_distributed(undisturbed, 1)
    assert first[0] == second[0] == whole, "who samples a rollout changes nothing in it"
    [dealt] = second[1]  # its half, and one more if the other one was late: nothing more was asked of it
    assert len(dealt) in (4, 5)
    assert sum(len(keys) for keys in first[1]) == 8 - 1, "all but the one that the lost one had done"
    assert first[2] == second[2] == 1 and first[4] == 1
    assert first[3] == [0, 0, 0] and second[3] == [0, None, 1], "the living one alone, then both"
    assert first[5] == second[5] >= 2


def undisturbed(rank: int, world: int) -> list[list[int]]:
    setting = make_fleet(ScriptedEngine(), rank=rank, ranks=world)
    give_weights(setting)
    begin(setting, seed=5)
    return tokens_of(setting.fleet.collect(refresh=lambda: None))


def the_new_one_joins_in(rank: int, world: int, folder: str) -> tuple[Any, ...]:
    """Rank 0's engine does not get on before rank 1's successor has sampled."""
    sampled = Path(folder) / "sampled"

    def gate(life: int) -> None:
        if rank == 1 and life == 1:
            sampled.touch()
        if rank == 0:
            wait_for(sampled)

    engine = ScriptedEngine([1] if rank else [], gate=gate)
    setting = make_fleet(engine, rank=rank, ranks=world, max_concurrent=1)
    give_weights(setting)
    begin(setting, seed=5)
    groups = setting.fleet.collect(refresh=lambda: give_weights(setting, version=7))
    versions = sorted(r.policy_version for g in groups for r in g.rollouts)
    return tokens_of(groups), setting.connections, versions, engine.policy_version, [len(k) for k in engine.asked]


def test_only_a_new_engine_gets_weights_while_others_sample(tmp_path: Path) -> None:
    [first, second] = run_distributed(the_new_one_joins_in, 2, str(tmp_path))
    [whole] = run_distributed(undisturbed, 1)
    assert first[0] == second[0] == whole
    assert first[1] == [0, None] and second[1] == [0, 1]
    assert first[3] == 0 and second[3] == 7, "the one that samples was left alone"
    assert set(first[2]) == {0, 7}


def one_is_slow(rank: int, world: int, folder: str) -> list[int]:
    """Rank 0's engine does not finish its first rollout before rank 1's has done all that is left."""

    begun, done = Path(folder) / "begun", Path(folder) / "done"

    def gate(life: int) -> None:
        if rank == 0:
            begun.touch()
            wait_for(done)

    engine = ScriptedEngine(gate=gate)
    setting = make_fleet(engine, rank=rank, ranks=world, max_concurrent=1)
    give_weights(setting)
    if rank == 1:
        wait_for(begun)  # from here on its time counts; if the other one came later, it would be the fast one
    begin(setting, seed=5)
    if rank == 1:
        deadline = time.monotonic() + 60
        while len(setting.fleet._share.done) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        done.touch()
    setting.fleet.collect(refresh=lambda: None)
    slowest = min(setting.fleet._speeds)
    speeds = [round(speed / slowest) for speed in setting.fleet._speeds]
    return [sum(len(keys) for keys in engine.asked), *speeds, setting.fleet._reserve()]


def test_a_slow_engine_takes_less(tmp_path: Path) -> None:
    [slow, fast] = run_distributed(one_is_slow, 2, str(tmp_path))
    assert slow[0] == 2 and fast[0] == 6, "the slow one what it had at first, the other one the rest"
    assert slow[1:3] == fast[1:3] and slow[1] == 1 < slow[2], "and by that the next step is dealt"
    assert slow[-1] > 0 == fast[-1], "the last ones to the fast one"


def nobody_samples_a_token(rank: int, world: int) -> tuple[int, bool]:
    """As where every environment fails at its reset."""

    class Empty(ScriptedEngine):
        def run(self, *arguments: Any, on_rollout: OnRollout, **others: Any) -> None:
            def without_tokens(key: int, rollout: Rollout) -> None:
                on_rollout(key, replace(rollout, loss_mask=np.zeros(1, bool)))

            super().run(*arguments, on_rollout=without_tokens, **others)

    setting = make_fleet(Empty(), rank=rank, ranks=world)
    give_weights(setting)
    before = list(setting.fleet._speeds)
    begin(setting, seed=5)
    groups = setting.fleet.collect(refresh=lambda: None)
    return sum(len(group.rollouts) for group in groups), setting.fleet._speeds == before


def test_a_step_without_a_token_is_dealt_and_says_nothing_of_speeds() -> None:
    assert run_distributed(nobody_samples_a_token, 2) == [(8, True)] * 2


def the_last_are_left_to_the_fast_one(rank: int, world: int, folder: str, is_lost: bool) -> list[int]:
    """Rank 0's engine would take all while rank 1's waits, but knows that it is slow; then rank 1's goes."""
    slow_has_waited, lost = Path(folder) / "waited", Path(folder) / "lost"

    def gate(life: int) -> None:
        if rank and life == 0:
            wait_for(slow_has_waited)

    engine = ScriptedEngine([1] if rank and is_lost else [], gate=gate, start=lambda life: life and wait_for(lost))
    setting = make_fleet(engine, rank=rank, ranks=world, max_concurrent=1)
    give_weights(setting)
    setting.fleet._speeds, setting.fleet._paces = [1.0, 3.0], [2.0, 1.0]  # so three are left to the fast one
    begin(setting, seed=5)
    share, deadline = setting.fleet._share, time.monotonic() + 60
    if rank == 0:
        while share.deal.num_left() > 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # in which it takes nothing more
        slow_has_waited.touch()

    def refresh() -> None:
        give_weights(setting, version=0)

    if is_lost:  # the successor starts when all is done: the reserve must go to the slow one
        threading.Thread(target=lambda: (_until(lambda: len(share.done) >= 6), lost.touch()), daemon=True).start()
    setting.fleet.collect(refresh)
    return [len(share.done)]


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_last_rollouts_go_to_who_ends_them_first(tmp_path: Path) -> None:
    """And to the slow engine all the same when the fast one is lost."""
    (tmp_path / "lives").mkdir()
    (tmp_path / "dies").mkdir()
    [[slow], [fast]] = run_distributed(the_last_are_left_to_the_fast_one, 2, str(tmp_path / "lives"), False)
    assert slow + fast == 8 and fast >= 3, "those that were left to it; without a reserve what it had at first"
    [[slow], [fast]] = run_distributed(the_last_are_left_to_the_fast_one, 2, str(tmp_path / "dies"), True)
    assert (slow, fast) == (7, 1)


class AheadEngine(ScriptedEngine):
    """Answers what has been begun before, and the first ``at_once`` that it is asked for in each run; the rest when
    there is nothing more, or is cut with one token.
    """

    def __init__(self, at_once: int) -> None:
        super().__init__()
        self.at_once = at_once
        self.begun: list[dict[int, Rollout | None]] = []  # by seed, by run

    def run(self, requests: Sequence[RolloutRequest], *, on_rollout: OnRollout, **kwargs: Any) -> None:
        self.asked.append([])
        self.begun.append({})
        waiting: list[RolloutRequest] = []
        new: Sequence[RolloutRequest] | Cut | None = requests
        while new is not None and new is not Cut.NOW:
            for request in new:
                self.asked[-1].append(request.key)
                self.begun[-1][request.seed] = request.begun
                if len(self.asked[-1]) <= self.at_once:
                    on_rollout(request.key, self.answer(request, StopReason.EOS))
                else:
                    waiting.append(request)
            time.sleep(0.001)
            new = kwargs["more"]()
        for request in waiting:
            on_rollout(request.key, self.answer(request, StopReason.EOS if new is None else StopReason.CUT))

    def answer(self, request: RolloutRequest, reason: StopReason) -> Rollout:
        """One token more."""
        before = [] if request.begun is None else request.begun.versions.tolist()
        return Rollout(
            prompt_id=request.prompt.prompt_id,
            token_ids=np.full(len(before) + 1, request.seed % 1000, np.int32),
            log_probs=np.zeros(len(before) + 1, np.float32),
            loss_mask=np.ones(len(before) + 1, bool),
            stop_reason=reason,
            policy_version=self.policy_version,
            versions=np.array([*before, self.policy_version], np.int32),
        )


def ahead(update: OnUpdate, *, at_once: int) -> Any:
    return make_fleet(AheadEngine(at_once), max_staleness=2, on_update=update, max_concurrent=4)  # it has 5 at once


def settled_ahead(update: OnUpdate) -> tuple[Any, dict[int, Rollout], dict[int, Rollout]]:
    """The first of two steps is there, and what there is of the second when its weights change."""
    setting = ahead(update, at_once=8)
    give_weights(setting)
    for seed in (1, 2):
        setting.fleet.plan(PROMPTS, seed=seed)
    setting.fleet.begin()
    setting.fleet.settle(refresh=lambda: None)
    first, second = map(dict, setting.fleet.known())
    return setting, first, second


@pytest.mark.usefixtures("one_rank")
def test_rollouts_of_later_steps_end_before_the_weights_change() -> None:
    setting, first, second = settled_ahead(OnUpdate.WAIT)
    assert len(first) == 8 and 2 <= len(second) <= 5, "what was under way has ended, and nothing was begun"
    assert all(rollout.is_whole for rollout in second.values())
    early = set(second)
    assert {r.policy_version for g in setting.fleet.take() for r in g.rollouts} == {0}
    give_weights(setting, version=1)
    setting.fleet.plan(PROMPTS, seed=3)
    assert setting.fleet.num_planned == 2
    setting.fleet.begin()
    setting.fleet.settle(refresh=lambda: None)
    assert setting.engine.asked[-1][: 8 - len(early)] == list(range(8 - len(early))), "the oldest first, none twice"
    groups = setting.fleet.take()
    versions = [r.versions.tolist() for group in groups for r in group.rollouts]
    assert versions == [[0] if key in early else [1] for key in range(8)]


@pytest.mark.usefixtures("one_rank")
def test_cut_rollouts_go_on_with_new_weights_also_from_a_checkpoint() -> None:
    setting, first, second = settled_ahead(OnUpdate.KEEP)
    assert len(first) == 8 and second and {r.stop_reason for r in second.values()} == {StopReason.CUT}
    assert not setting.fleet._plan[1].is_whole
    saved = torch.load(_file_of(setting.fleet.known()), weights_only=True)
    setting.fleet.take()

    def go_on(used: Any) -> tuple[list[int], dict[int, list[int] | None], list[list[int]]]:
        give_weights(used, version=1)
        used.fleet.plan(PROMPTS, seed=3)
        used.fleet.begin()
        used.fleet.settle(refresh=lambda: None)
        begun = {seed: None if r is None else r.versions.tolist() for seed, r in used.engine.begun[-1].items()}
        versions = [r.versions.tolist() for g in used.fleet.take() for r in g.rollouts]
        return used.engine.asked[-1][:8], dict(list(begun.items())[:8]), versions

    asked, begun, versions = go_on(setting)
    assert asked == list(range(8)) and sorted(map(str, begun.values())) == sorted(
        ["[0]"] * len(second) + ["None"] * (8 - len(second))
    )
    assert versions == [[0, 1] if key in second else [1] for key in range(8)]
    resumed = ahead(OnUpdate.KEEP, at_once=8)
    names = [[prompt.prompt_id for prompt in PROMPTS]] * 2
    extra = {"weighting": {}, "num_restarts": 0, "skipped_in_a_row": 0, "next_prompts": names, "group_size": 2}
    extra["queue"] = {name.split(".")[1]: tensor for name, tensor in saved.items()}
    queue = RunState.of_extra(extra, [PROMPTS, PROMPTS], group_size=2).queue
    assert queue is not None
    for seed, known in zip((1, 2), queue, strict=True):
        resumed.fleet.plan(PROMPTS, seed=seed, known=known)
    assert resumed.fleet.can_settle and not resumed.fleet.is_begun
    resumed.fleet.settle(refresh=lambda: pytest.fail("all is there"))
    assert tokens_of(resumed.fleet.take()) == [[int(first[2 * i + j].token_ids[0]) for j in range(2)] for i in range(4)]
    assert go_on(resumed) == (asked, begun, versions), "asked for what the unbroken run asks for"


def _file_of(queue: Sequence[Any]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(RunState.queue_tensors(queue), file)
    file.seek(0)
    return file
