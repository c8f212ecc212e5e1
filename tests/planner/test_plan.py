"""Arithmetic of the planner that needs no model: published sizes, operations, what to change, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_rest.config import ConfigError, RestConfig, load
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.advice import changes_that_fit
from megatron_rest.planner.hardware import HARDWARE
from megatron_rest.planner.parameters import count_stages, total_parameters
from megatron_rest.planner.plan import make_plan
from megatron_rest.planner.report import as_text
from megatron_rest.planner.shapes import PUBLISHED
from megatron_rest.planner.work import forward_flops
from tests.helpers.tiny_model import build_tiny_model, read_config

# What transformers reports for the published checkpoints.
PUBLISHED_TOTALS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-235B-A22B": 235_093_634_560,
}


def configuration(*overrides: str) -> RestConfig:
    """70B-shaped, on 32 GPUs a replica."""
    return load(
        overrides=[
            "model.path=/nowhere/Llama-3.3-70B-Instruct",
            "model.max_sequence_length=4096",
            "model.dtype=bfloat16",
            "rollout.dtype=bfloat16",
            "data.max_prompt_tokens=2048",
            "data.prompts_per_step=512",
            "rollout.max_response_tokens=2048",
            "rollout.rollouts_per_prompt=4",
            "rollout.tensor_parallel=8",
            "optimizer.updates_per_step=8",
            "trainer.max_tokens_per_microbatch=8192",
            "parallel.tensor_parallel=8",
            "parallel.pipeline_parallel=4",
            "parallel.sequence_parallel=true",
            "parallel.distributed_optimizer=true",
            *overrides,
        ]
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_published(name):
    assert total_parameters(ModelShape.from_hf_config(PUBLISHED[name])) == PUBLISHED_TOTALS[name]


@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 1), (8, 4, 1), (4, 2, 16)])
def test_ranks_together_hold_the_model(tp, pp, ep):
    name = "Qwen3-30B-A3B" if ep > 1 else "Llama-3.3-70B"
    shape = ModelShape.from_hf_config(PUBLISHED[name])
    overrides = [f"parallel.{k}={v}" for k, v in
                 {"tensor_parallel": tp, "pipeline_parallel": pp, "expert_parallel": ep}.items()]  # fmt: skip
    stages = count_stages(shape, load(overrides=overrides).parallel)
    dense, experts = sum(s.dense for s in stages) * tp, sum(s.experts for s in stages) * ep
    norms = (tp - 1) * (shape.num_layers * (2 * shape.hidden_size + 2 * shape.head_dim * shape.has_qk_norm)
                        + shape.num_layers * shape.num_experts * shape.hidden_size + shape.hidden_size)  # fmt: skip
    assert dense + experts == PUBLISHED_TOTALS[name] + norms  # norms and router are whole on every TP rank


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_operations_of_a_forward_pass_are_those_that_torch_counts(arch, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path, arch=arch, tied=False, hidden=64, layers=3)
    shape = ModelShape.from_hf_config(read_config(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = torch.randint(0, shape.vocab_size, (1, 48))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(tokens)
    # An eager product computes the whole square that a causal kernel computes half of.
    assert forward_flops(shape, tokens=48, mean_context=48) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_what_does_not_fit_is_said_with_changes_that_do():
    plan = make_plan(configuration(), HARDWARE["h100"], world_size=128)
    assert not plan.fits
    assert "needs" in plan.problems[0]
    changes = changes_that_fit(plan)
    assert changes
    for change in changes:
        again = make_plan(load(None, change.overrides, base=plan.config), HARDWARE["h100"], world_size=128)
        assert again.fits
        assert again.peak == change.plan.peak


@pytest.mark.parametrize(
    ("override", "item"),
    [
        ("parallel.distributed_optimizer=false", "optimiser"),
        ("parallel.sequence_parallel=false", "activations"),
        ("trainer.max_tokens_per_microbatch=16384", "activations"),
        ("weight_sync.bucket_bytes=8000000000", "sync buffers"),
    ],
)
def test_an_option_changes_its_own_line(override, item):
    def items(*overrides: str) -> dict[str, int]:
        stage = make_plan(configuration(*overrides), HARDWARE["h200"], world_size=128).stages[0]
        return {i.name: i.num_bytes for i in (*stage.always, *stage.training, *stage.syncing)}

    before, after = items(), items(override)
    assert after[item] > 1.5 * before[item]
    untouched = {"weights", "gradients", "engine: weights"}
    assert {name: before[name] for name in untouched} == {name: after[name] for name in untouched}


def test_engines_in_fp8_take_half_and_senders_keep_a_copy_while_they_send():
    def plan(*overrides: str):
        engines = ("rollout.replicas=4", "weight_sync.transport=nccl", "loss.tis_cap=2.0", *overrides)
        return make_plan(configuration(*engines), HARDWARE["h200"], world_size=128)

    plain, shape = plan(), plan().shape
    matrices = total_parameters(shape, matrices_only=True) - 2 * shape.vocab_size * shape.hidden_size
    whole = total_parameters(shape) * 2
    assert plain.sync.copy_bytes == whole
    for quantization, scales in (("fp8_channel", matrices // shape.hidden_size), ("fp8_block", matrices // 128**2)):
        fp8 = plan(f"rollout.quantization={quantization}")
        assert fp8.sync.copy_bytes == pytest.approx(whole - matrices + 4 * scales, rel=1e-9)
        assert fp8.sync.limit < 0.55 * plain.sync.limit
        simulated = [p.with_simulated_sync().sync for p in (plain, fp8)]
        assert all(sync.limit < sync.simulated < sync.gather for sync in simulated)
        assert simulated[1].simulated < 0.6 * simulated[0].simulated
        buffers = [sum(i.num_bytes for i in p.stages[0].syncing if i.name == "sync buffers") for p in (plain, fp8)]
        p = fp8.config.parallel
        of_a_rank = matrices / p.tensor_parallel / p.pipeline_parallel
        assert buffers[1] - buffers[0] == pytest.approx(of_a_rank, rel=1e-3)


def test_what_an_update_leaves_free_in_the_heap_is_counted_on_a_cpu_alone():
    def items(name: str, tokens: int) -> tuple[int, int]:
        config = configuration(f"trainer.max_tokens_per_microbatch={tokens}", "rollout.tensor_parallel=1")
        stage = make_plan(config, HARDWARE[name], world_size=32).stages[0]
        return sum(i.num_bytes for i in stage.training), next(i.num_bytes for i in stage.always if i.name == "not ours")

    (small, held), (large, held_more) = items("cpu", 8192), items("cpu", 16384)
    assert held_more - held == pytest.approx(HARDWARE["cpu"].holes * (large - small), abs=1)
    assert items("h100", 8192)[1] == items("h100", 16384)[1]


def test_a_model_nobody_knows_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"Mystery-9B.*config\.json"):
        make_plan(configuration("model.path=/nowhere/Mystery-9B"), HARDWARE["h100"], world_size=32)


def test_layers_that_cannot_be_cut_are_refused():
    with pytest.raises(ConfigError, match="80 layers do not divide"):
        make_plan(configuration("parallel.pipeline_parallel=3"), HARDWARE["h100"], world_size=24)


def test_the_command_needs_no_torch_and_says_by_its_status_whether_it_fits(tmp_path: Path):
    import yaml

    from megatron_rest.config import to_dict

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(to_dict(configuration())))
    program = (
        "import sys; sys.modules['torch'] = None; from megatron_rest.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, "plan", str(file), "--gpus", "128", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    engines = ("rollout.replicas=4", "weight_sync.transport=nccl", "loss.tis_cap=2.0")
    tight, roomy = plan(), plan("--gpu", "h200", "--json")
    assert (tight.returncode, roomy.returncode) == (1, 0), tight.stderr + roomy.stderr
    assert "what would fit:" in tight.stdout
    told = json.loads(roomy.stdout)
    assert told["parameters"] == PUBLISHED_TOTALS["Llama-3.3-70B"]
    assert len(told["stages"]) == 4
    assert told["seconds"]["update"] > 0
    apart = json.loads(plan("--gpu", "h200", "--json", *engines).stdout)["sync_seconds"]
    assert apart["simulated"] is None, "for want of torch"
    assert apart["limit"] > 0
    wrong = plan("optimizer.lrr=1")
    assert wrong.returncode == 2
    assert "did you mean optimizer.lr?" in wrong.stderr


def test_what_leaves_while_engines_sample_is_not_there_beside_them() -> None:
    """Gradients and optimiser count in an update, and not beside the engine's cache."""
    settings = ("rollout.sleep_level=2", "rollout.gpu_memory_utilization=0.6")
    stay, leave = (
        make_plan(configuration(*settings, f"trainer.offload={flag}"), HARDWARE["h100"], world_size=64)
        for flag in ("false", "true")
    )
    for before, after in zip(stay.stages, leave.stages, strict=True):
        moved = {item.name: item.num_bytes for item in before.always if item.name in ("gradients", "optimiser")}
        assert len(moved) == 2 and sum(i.num_bytes for i in before.sampling) > sum(i.num_bytes for i in before.training)
        assert after.training_peak == before.training_peak
        assert sum(i.num_bytes for i in before.always) - sum(i.num_bytes for i in after.always) == sum(moved.values())
        assert after.peak < before.peak
    assert stay.time is not None and leave.time is not None
    state = max(i.num_bytes for stage in stay.stages for i in stage.always if i.name == "optimiser")
    assert leave.time.total - stay.time.total == pytest.approx(2 * state / (64e9 * 0.8))


def test_host_memory_of_a_save_is_what_ranks_own_or_all_that_their_replicas_do() -> None:
    """Two replicas: each owns half of the masters and moments, and gathers the other half for any layout."""
    config = load(
        overrides=[
            "model.path=/nowhere/Qwen3-8B", "model.dtype=bfloat16", "parallel.tensor_parallel=4",
            "parallel.sequence_parallel=true", "parallel.distributed_optimizer=true", "rollout.dtype=bfloat16",
            "rollout.gpu_memory_utilization=0.4",
        ]
    )  # fmt: skip
    plan = make_plan(config, HARDWARE["h100"], world_size=8)
    parameters = count_stages(plan.shape, config.parallel)[0].total
    [stage] = plan.stages
    assert (stage.owned, stage.gathered) == (parameters * (2 + 6), parameters * (2 + 12))
    [line] = [line for line in as_text(plan).splitlines() if line.startswith("host memory")]
    assert f"at most {8 * stage.owned / 1e9:.0f} as it lies" in line
    assert line.endswith(f"at least {8 * stage.gathered / 1e9:.0f}")
