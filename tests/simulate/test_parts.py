"""A tiny case of each part of the simulation, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.scale import WAITS_OF_ROTATION, worse
from megatron_rest.config import load
from megatron_rest.mcore.dry import DryRank, dry_rank
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.hardware import HARDWARE
from megatron_rest.planner.plan import make_plan
from megatron_rest.planner.published import POINTS
from megatron_rest.simulate.__main__ import main
from megatron_rest.simulate.apart import run_apart
from megatron_rest.simulate.balance import long_tailed, simulate_balance
from megatron_rest.simulate.exchange import simulate_exchange
from megatron_rest.simulate.findings import Finding
from megatron_rest.simulate.start import simulate_start
from tests.helpers.tiny_model import build_tiny_model, read_config


def config(folder: Path, *overrides: str) -> Any:
    return load(
        overrides=[
            f"model.path={folder}", "model.max_sequence_length=256", "model.dtype=bfloat16", "rollout.dtype=bfloat16",
            "data.max_prompt_tokens=128", "rollout.max_response_tokens=128", "data.prompts_per_step=32",
            "rollout.rollouts_per_prompt=4", "optimizer.updates_per_step=1", "trainer.max_tokens_per_microbatch=512",
            "trainer.share_prompts=off", "parallel.distributed_optimizer=true", *overrides,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), tied=False, layers=4, with_tokenizer=False)


def test_an_uneven_job_computes_less_of_the_time(folder: Path) -> None:
    shape = ModelShape.from_hf_config(read_config(folder))
    lengths = long_tailed(median=40, most=128, prompts=[64, 100, 128])
    assert lengths.responses.max() == 128 and abs(np.median(lengths.responses) - 40) < 3
    deep = ["parallel.pipeline_parallel=4", "parallel.virtual_pipeline=1"]
    few, many = (simulate_balance(config(folder, *deep), shape, lengths, world_size=n) for n in (64, 4))
    flat = simulate_balance(config(folder), shape, lengths, world_size=1)
    assert few.share < many.share < flat.share <= 1 + 1e-9
    assert flat.padding == 0 and flat.share > 0.999


def test_rollouts_reach_every_rank_once() -> None:
    found = simulate_exchange(rollouts=16384, response=8192, world_size=1024)
    assert 1 <= found.ratio < 1.01


@pytest.fixture(scope="module")
def started(folder: Path) -> Any:
    overrides = ("parallel.tensor_parallel=2", "parallel.pipeline_parallel=2")
    return run_apart(simulate_start, config(folder, *overrides), rank=3, world_size=64)


def test_a_rank_makes_its_own_groups_only(started: Any) -> None:
    assert started.made == len(started.members) - 1 < 60
    assert started.sockets < 64 * 4


@pytest.mark.parametrize(("rank", "stage"), [(0, 0), (3, 1)])
def test_a_dry_rank_holds_what_is_planned(folder: Path, rank: int, stage: int) -> None:
    cut = ("parallel.tensor_parallel=1", "parallel.pipeline_parallel=2")
    cut += (
        "megatron.ddp.overlap_grad_reduce=true",
        "megatron.ddp.overlap_param_gather=true",
    )  # as the recipes have them
    ours = config(folder, *cut)
    shape = ModelShape.from_hf_config(read_config(folder))
    found: DryRank = run_apart(dry_rank, ours, shape, rank=rank, world_size=4)
    planned = make_plan(ours, HARDWARE["cpu"], world_size=4).stages[stage]
    items = {item.name: item.num_bytes for item in planned.always}
    assert found.stage == stage
    assert 2 * found.parameters == items["weights"]
    assert 0 <= found.weights - items["weights"] < 128, "the rotary embedding's frequencies"
    assert found.gradients == pytest.approx(items["gradients"], rel=0.01)
    assert found.update == pytest.approx(sum(item.num_bytes for item in planned.training), rel=0.25)
    assert found.saving < 0.05 * found.optimizer
    assert sum(found.waits.values()) == WAITS_OF_ROTATION * 2, found.waits


def dry_rank_of_a_curious_step(*args: Any, **options: Any) -> DryRank:
    from megatron_rest.mcore import forward_step

    real = forward_step.packed_seq_params

    def look(microbatch: Any) -> Any:
        assert int(microbatch.cu_seqlens.diff().max()) > 0
        return real(microbatch)

    forward_step.packed_seq_params = look
    return dry_rank(*args, **options)


def test_a_look_at_the_device_is_counted(folder: Path) -> None:
    shape = ModelShape.from_hf_config(read_config(folder))
    found: DryRank = run_apart(dry_rank_of_a_curious_step, config(folder), shape, rank=0, world_size=2)
    ours = {place: count for place, count in found.waits.items() if "rope_utils" not in place}
    assert list(ours.values()) == [1.0] and "test_parts.py" in next(iter(ours))


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p.name} {p.value:g}")
def test_planned_times_are_near_published_ones(point: Any) -> None:
    assert 0.7 <= point.ratio() <= 1.4


def test_the_command_prints_what_is_missed_first(folder: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("{}")
    overrides = [
        f"model.path={folder}", "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2", "rollout.replicas=2",
        "weight_sync.transport=gloo", "model.max_sequence_length=256", "data.max_prompt_tokens=128",
        "rollout.max_response_tokens=128",
    ]  # fmt: skip
    arguments = [str(run), "--only", "balance,transfer,exchange", "--ranks", "8", *overrides]
    status = main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {f["name"].split(":")[0] for f in found} == {"balance", "transfer", "exchange"}
    assert status == int(not all(f["is_reached"] for f in found))
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    marks = ["MISSED" in line for line in lines[1:]]
    assert marks == sorted(marks, reverse=True)
    assert main([str(run), "--ranks", "7", *overrides]) == 2


def test_what_got_worse_is_found() -> None:
    def finding(name: str, value: float, *, at_most: bool = True, unit: str = "") -> Finding:
        return Finding(name=name, value=value, unit=unit, bound=1.0, at_most=at_most)

    recorded = {"bytes": 10.0, "share": 90.0, "plan": 1.0}
    fine = [finding("bytes", 10.4), finding("share", 88, at_most=False), finding("plan", 2.5, unit="s")]
    assert worse([*fine, finding("new", 5)], recorded) == []
    bad = [finding("bytes", 10.6), finding("share", 80, at_most=False), finding("plan", 3.5, unit="s")]
    assert [line.split(":")[0] for line in worse(bad, recorded)] == ["bytes", "share", "plan"]
