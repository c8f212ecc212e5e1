"""Which rank has which engine, what is refused, and what follows when engines go (real ones are killed in test_run.py).

The engine and the transfer are scripted here: what is tested is who is asked for what, and when the run gives up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    RestConfig,
    RolloutConfig,
    RolloutQuantization,
    WeightSyncConfig,
    validate,
)
from megatron_rest.rollout.engine import EngineLostError, Exam, OnRollout, RolloutRequest
from megatron_rest.rollout.remote import RemoteEngine
from megatron_rest.trainer.fleet import EngineFleet, Placement, engine_devices
from megatron_rest.types import PromptSample, Rollout, StopReason
from megatron_rest.weight_sync.sync import WeightSyncError


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
        ({"max_staleness": 2}, "0 .synchronous. or 1"),
        ({"sleep_level": 3}, "vLLM has 1 and 2"),
        ({"sleep_level": 1, "replicas": 1}, "set one of them to 0"),
        ({"engine_timeout_seconds": 0}, "expected a finite number > 0"),
        ({"max_turns": 0}, "expected at least 1"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RolloutConfig(**values)


class ScriptedEngine(RemoteEngine):
    """Dies during run after so many rollouts, as the script says; None = does not."""

    def __init__(self, deaths: Sequence[int | None]) -> None:
        self.deaths = list(deaths)
        self.alive = True
        self.asked: list[list[int]] = []
        self.exams: list[Exam | None] = []
        self.num_restarts = 0
        self.policy_version = 0

    @property
    def is_alive(self) -> bool:
        return self.alive

    def restart(self) -> None:
        self.alive, self.num_restarts = True, self.num_restarts + 1

    def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_tokens: int,
        on_rollout: OnRollout,
        exam: Exam | None = None,
    ) -> None:
        assert self.alive
        self.exams.append(exam)
        self.asked.append([r.key for r in requests])
        death = self.deaths.pop(0) if self.deaths else None
        for count, request in enumerate(reversed(requests)):  # they end in any order
            if count == death:
                self.alive = False
                raise EngineLostError("scripted")
            ids = np.array([request.seed % 1000], np.int32)
            on_rollout(
                request.key,
                Rollout(
                    prompt_id=request.prompt.prompt_id,
                    token_ids=ids,
                    log_probs=np.zeros(1, np.float32),
                    loss_mask=np.ones(1, bool),
                    stop_reason=StopReason.EOS,
                    policy_version=self.policy_version,
                ),
            )


class ScriptedSync:
    """Each push does the next thing of the script."""

    def __init__(self, engine: ScriptedEngine, script: list[str]) -> None:
        self.engine, self.script = engine, script

    def push(self, version: int) -> Any:
        match self.script.pop(0):
            case "killed":
                self.engine.alive = False
                raise WeightSyncError("scripted") from EngineLostError("scripted")
            case "broken":
                raise WeightSyncError("the engine raised") from RuntimeError("half loaded")
            case "bytes differ":
                raise WeightSyncError("bytes differ")
        return SimpleNamespace(version=version)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_fleet(deaths: Sequence[int | None] = (), script: Sequence[str] = (), restarts: int = 2) -> Any:
    engine, connections = ScriptedEngine(deaths), []
    steps = list(script)

    def connect() -> Any:
        connections.append(engine.num_restarts)
        return ScriptedSync(engine, steps)

    config = RolloutConfig(replicas=1, rollouts_per_prompt=2, max_restarts=restarts)
    fleet = EngineFleet(engine, placement=Placement(((0,),)), rank=0, config=config, connect=connect)
    return SimpleNamespace(fleet=fleet, engine=engine, connections=connections)


PROMPTS = [PromptSample(prompt_id=f"p{i % 3}", token_ids=np.zeros(1, np.int32), ground_truth="") for i in range(4)]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("in_background", [False, True])
def test_only_what_is_missing_is_sampled_again_with_its_own_seed(in_background: bool) -> None:
    calm = make_fleet()
    calm.fleet.begin(PROMPTS, seed=5, in_background=False)
    expected = calm.fleet.collect(refresh=lambda: pytest.fail("nothing was lost"))
    refreshed: list[int] = []
    setting = make_fleet(deaths=[3, 0])
    setting.fleet.begin(PROMPTS, seed=5, in_background=in_background)
    groups = setting.fleet.collect(refresh=lambda: refreshed.append(setting.engine.num_restarts))
    assert setting.engine.asked == [list(range(8)), [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert refreshed == [1, 2] and setting.fleet.num_restarts == 2
    tokens = [[r.token_ids.tolist() for r in g.rollouts] for g in groups]
    assert tokens == [[r.token_ids.tolist() for r in g.rollouts] for g in expected]
    assert [g.prompt.prompt_id for g in groups] == ["p0", "p1", "p2", "p0"]
    assert tokens[0] != tokens[3], "the same prompt twice is answered twice"
    hopeless = make_fleet(deaths=[0] * 9)
    hopeless.fleet.begin(PROMPTS, seed=5, in_background=in_background)
    with pytest.raises(EngineLostError, match=r"lost 3 times in a row while sampling .rollout.max_restarts 2."):
        hopeless.fleet.collect(refresh=lambda: None)


@pytest.mark.usefixtures("one_rank")
def test_an_exam_is_one_answer_a_prompt_and_survives_a_lost_engine() -> None:
    exam = Exam(environment="bfcl", max_turns=5)
    setting = make_fleet(deaths=[2])
    refreshed: list[int] = []
    answers = setting.fleet.examine(PROMPTS, exam, max_response_tokens=9, refresh=lambda: refreshed.append(1))
    assert [len(group.rollouts) for group in answers] == [1, 1, 1, 1]
    assert [group.prompt.prompt_id for group in answers] == ["p0", "p1", "p2", "p0"]
    assert setting.engine.asked == [[0, 1, 2, 3], [0, 1]] and setting.engine.exams == [exam, exam] and refreshed == [1]
    setting.fleet.begin(PROMPTS, seed=1, in_background=False)
    with pytest.raises(AssertionError, match="busy"):
        setting.fleet.examine(PROMPTS, exam, max_response_tokens=9, refresh=lambda: None)


@pytest.mark.usefixtures("one_rank")
def test_a_lost_engine_is_replaced_and_all_is_sent_again() -> None:
    setting = make_fleet(script=["killed", "broken", "fine", "fine"])
    report, gap = setting.fleet.deliver(4, lambda: 0.25)
    assert (report.version, gap, setting.fleet.version) == (4, 0.25, 4)
    assert setting.connections == [0, 1, 2] and setting.fleet.num_restarts == 2

    def lost_under_the_canary() -> float | None:
        if setting.engine.num_restarts == 2:
            setting.engine.alive = False
            return None
        return 0.5

    setting.fleet._sync.script += ["fine"]
    assert setting.fleet.deliver(5, lost_under_the_canary)[1] == 0.5
    assert setting.fleet.num_restarts == 3


@pytest.mark.usefixtures("one_rank")
def test_what_is_no_loss_ends_the_run() -> None:
    setting = make_fleet(script=["bytes differ"])
    with pytest.raises(WeightSyncError, match="bytes differ"):
        setting.fleet.deliver(4, lambda: 0.0)
    assert setting.engine.num_restarts == 0
    hopeless = make_fleet(script=["killed"] * 9)
    with pytest.raises(EngineLostError, match="3 times in a row while taking weights of version 4"):
        hopeless.fleet.deliver(4, lambda: 0.0)
