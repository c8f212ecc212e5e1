"""What the planner counts of a step: the trainer's own rules of packing and skipping, on lengths that are drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_rest.config import ConfigError, RestConfig, WeightSource, load
from megatron_rest.data.packing import RowCost
from megatron_rest.data.prompt_files import PROMPT_SCHEMA, SCHEMA_VERSION
from megatron_rest.model_map import ModelShape
from megatron_rest.passes import is_scored
from megatron_rest.planner.hardware import HARDWARE
from megatron_rest.planner.lengths import Lengths
from megatron_rest.planner.plan import Plan, make_plan
from megatron_rest.planner.report import as_dict, as_text
from megatron_rest.planner.savings import savings_of
from megatron_rest.planner.shapes import PUBLISHED
from megatron_rest.planner.work import (
    Assumptions,
    ReplicaTime,
    StepWork,
    deal_as_configured,
    forward_flops,
    step_work,
)

SHAPE = ModelShape.from_hf_config(PUBLISHED["Qwen3-8B"])
PROMPT, RESPONSE, SIZE = 748, 362, 4


def configuration(*overrides: str) -> RestConfig:
    return load(
        overrides=[
            "model.path=/nowhere/Qwen3-8B",
            "model.max_sequence_length=4096",
            "model.dtype=bfloat16",
            "rollout.dtype=bfloat16",
            "data.max_prompt_tokens=2048",
            "data.prompts_per_step=64",
            "rollout.max_response_tokens=2048",
            f"rollout.rollouts_per_prompt={SIZE}",
            "trainer.max_tokens_per_microbatch=8192",
            "parallel.tensor_parallel=4",
            *overrides,
        ]
    )


def constant(prompt: int = PROMPT, response: int = RESPONSE) -> Lengths:
    """Lengths without a spread: everything can be worked out by hand."""
    return Lengths(
        prompts=np.array([prompt]), responses=np.array([response]), prompt_source="here", response_source="here"
    )


def work(*overrides: str, is_sharing: bool = False, zero_groups: float = 0.0, world_size: int = 4) -> StepWork:
    assumed = Assumptions(shares_prompts=is_sharing, zero_groups=zero_groups)
    config = configuration(*overrides)
    return step_work(config, SHAPE, world_size=world_size, lengths=constant(), assumed=assumed)


def test_plain_operations_by_hand():
    """A sequence's last token is a label only; the output layer sees responses alone."""
    rows = PROMPT + RESPONSE - 1
    layers = forward_flops(SHAPE, tokens=rows, mean_context=(rows + 1) / 2, head=False)
    head = 2 * SHAPE.vocab_size * SHAPE.hidden_size * RESPONSE
    found = work()
    assert found.forward_flops == pytest.approx(64 * SIZE * (layers + head), rel=1e-6)
    assert found.packing.rows == found.packing.plain_rows == 64 * SIZE * rows
    assert found.update_flops == pytest.approx(3 * found.forward_flops)
    # One replica of four GPUs without a pipeline idles nowhere.
    assert found.forward == pytest.approx(found.forward_flops / 4)
    assert (found.bubble, found.padding, found.packing.num_empty) == (0.0, 0.0, 0)


def test_shared_rows_and_pairs_by_hand():
    found = work(is_sharing=True)
    shared = PROMPT - 1
    assert found.packing.rows == 64 * (shared + SIZE * RESPONSE)
    assert found.packing.prompt_copies == 1.0
    cost = RowCost.of_shape(SHAPE)
    pairs = shared * (shared + 1) / 2 + SIZE * (RESPONSE * shared + RESPONSE * (RESPONSE + 1) / 2)
    rows = shared + SIZE * RESPONSE + cost.pair * pairs + cost.loss_row * SIZE * RESPONSE
    unit = forward_flops(SHAPE, tokens=1, mean_context=0, head=False)
    assert found.forward_flops == pytest.approx(64 * rows * unit, rel=1e-6)
    assert work().forward_flops / found.forward_flops == pytest.approx(1.95, abs=0.02)


def test_groups_that_do_not_fit_are_cut():
    """Eight answers of 1,500 tokens behind one prompt are more than the 4,096 rows of a microbatch."""
    config = configuration("rollout.rollouts_per_prompt=8", "trainer.max_tokens_per_microbatch=4096")
    found = step_work(
        config, SHAPE, world_size=4, lengths=constant(1000, 1500), assumed=Assumptions(shares_prompts=True)
    )
    assert found.packing.prompt_copies >= 4  # two answers fit beside the prompt
    assert found.packing.rows < found.packing.plain_rows


def test_a_pipeline_pays_for_its_bubble_and_for_one_length():
    """Two stages, four microbatches at least; the longest one is the length of all."""
    config = configuration("parallel.pipeline_parallel=2")
    spread = replace(constant(), responses=np.array([10, 2000]))
    found = step_work(config, SHAPE, world_size=8, lengths=spread, assumed=Assumptions(shares_prompts=False))
    bins = found.packing.num_microbatches
    assert bins >= 4
    assert 1 / (bins + 1) < found.bubble < 1 / (bins + 1) + 0.1, "and for the output layer, in the last stage alone"
    assert 0 < found.padding < 0.3
    assert found.forward > found.forward_flops / 8


def test_the_output_layer_makes_the_last_stage_slower():
    """Even microbatches: 1F1B's bubble, and with the head what the last stage has to do more than the mean."""
    config, cost = configuration("parallel.pipeline_parallel=2"), RowCost.of_shape(SHAPE)
    samples = constant().draw(SIZE * 8, group_size=SIZE, seed=0)
    replicas, report = deal_as_configured(config, 8, samples, cost, is_sharing=False)
    even, real = (ReplicaTime.of(config, replicas[0], samples, cost, has_head=flag) for flag in (False, True))
    bins = report.num_microbatches
    work = [sum(part.cost for part in parts) for parts in replicas[0]]
    assert work == pytest.approx([work[0]] * bins)
    assert even.time == pytest.approx((bins + 1) * work[0])
    assert even.busy == real.busy == pytest.approx(bins * work[0])
    head = cost.loss_row * SIZE * 8 * RESPONSE / bins
    slower, mean = (work[0] - head) / 2 + head, work[0] / 2
    assert real.time == pytest.approx(2 * (bins * slower + (work[0] - head) / 2))
    assert slower > 1.02 * mean


@pytest.mark.parametrize(
    ("overrides", "scored", "passes"),
    [
        ((), 0, 0),
        (("optimizer.updates_per_step=4",), 3, 3),
        (("optimizer.updates_per_step=4", "loss.old_log_probs=engine"), 0, 0),
        (("optimizer.updates_per_step=4", "weighting.source=entropy_ema"), 4, 4),
        (("weighting.source=variance_optimal",), 1, 1),
        (("weighting.source=uniform", "loss.kl_coef=0.01"), 0, 1),  # the reference policy
    ],
)
def test_scoring_passes(overrides, scored, passes):
    found = work(*overrides)
    assert found.num_scored == scored
    assert found.score_passes == pytest.approx(passes)
    everything = found.with_all_scored()
    assert everything.num_scored == found.num_updates
    assert everything.score_passes - found.score_passes == pytest.approx(found.num_updates - scored)


@pytest.mark.parametrize("source", WeightSource)
def test_the_rule_of_scoring_is_the_trainers(source):
    from megatron_rest.weighting import RestWeighting

    config = configuration(f"weighting.source={source}")
    measures = RestWeighting.from_config(config.weighting).statistic is not None
    assert is_scored(config, 0) is measures
    assert is_scored(config, 1)


def test_zero_groups_leave_training_and_are_measured_all_the_same():
    plain, fewer = work(), work(zero_groups=0.25)
    assert fewer.left_out == 0.25
    assert fewer.update_flops == pytest.approx(0.75 * plain.update_flops)
    measured = work("weighting.source=entropy_ema", zero_groups=0.25)
    assert measured.score_flops == pytest.approx(plain.forward_flops), "a statistic is of all samples"
    for kept in ("loss.entropy_coef=0.01", "loss.kl_coef=0.01", "loss.aggregation=reference_code"):
        assert work(kept, zero_groups=0.25).left_out == 0.0


def test_drawing_again_fills_the_step_and_costs_rollouts():
    def plan(*overrides: str) -> Plan:
        return make_plan(configuration(*overrides), HARDWARE["h100"], world_size=4, zero_groups=0.5)

    once, again = plan(), plan("data.resample_zero_groups=3")
    assert (once.work.left_out, again.work.left_out) == (0.5, 0.0)
    assert once.time is not None and again.time is not None
    assert again.time.rollout == pytest.approx(2 * once.time.rollout)
    assert plan("data.resample_zero_groups=1").work.left_out == 0.0


def test_sharing_is_for_local_attention():
    on_gpu = make_plan(configuration(), HARDWARE["h100"], world_size=4)
    on_cpu = make_plan(configuration(), HARDWARE["cpu"], world_size=4)
    assert (on_gpu.assumed.shares_prompts, on_cpu.assumed.shares_prompts) == (False, True)
    assert on_cpu.work.packing.rows < on_gpu.work.packing.rows
    keys = [item.name for item in on_cpu.stages[0].training if item.name == "keys of prompts"]
    assert keys and all(item.name != "keys of prompts" for item in on_gpu.stages[0].training)
    with pytest.raises(ConfigError, match=r"trainer\.share_prompts=on"):
        make_plan(configuration("trainer.share_prompts=on"), HARDWARE["h100"], world_size=4)


def test_the_page_says_what_pays():
    plan = make_plan(configuration("optimizer.updates_per_step=4"), HARDWARE["h100"], world_size=8, zero_groups=0.3)
    sharing, scoring, zero = savings_of(plan)
    assert (sharing.is_used, scoring.is_used, zero.is_used) == (False, True, True)
    assert plan.time is not None
    training = plan.time.score + plan.time.update
    assert sharing.before == scoring.after == zero.after == pytest.approx(training)
    assert sharing.after < training < min(scoring.before, zero.before)
    page = as_text(plan)
    assert "shared prompts: would be training" in page and "is off with Transformer Engine" in page
    assert "3 of 4 updates of a step scored" in page
    assert "zero groups: training" in page
    told = as_dict(plan)
    assert told["savings"]["zero_groups"]["after"] == pytest.approx(training)
    assert told["savings"]["shared_prompts"]["is_used"] is False
    assert told["training"]["scored_updates"] == 3
    json.dumps(told)


def prepared(folder: Path, prompts: list[int], answers: list[int]) -> Path:
    """A folder as ``megatron-rest-data convert`` leaves it, as far as lengths go."""
    folder.mkdir()
    rows = [
        {"prompt_id": str(i), "prompt_token_ids": [0] * p, "messages": "[]", "answer_text": "",
         "answer_token_ids": [0] * a, "answer_token_starts": None, "answer_region_ends": [], "answer_region_ids": [],
         "ground_truth": "", "tools": "[]", "calls": "[]", "metadata": "{}", "source_file": "", "source_row": i}
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]  # fmt: skip
    with pa.OSFile(str(folder / "data-00000.arrow"), "wb") as sink, pa.ipc.new_file(sink, PROMPT_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA))
    entry = {"name": "data-00000.arrow", "rows": len(rows), "bytes": (folder / "data-00000.arrow").stat().st_size}
    (folder / "manifest.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "outputs": [entry]}))
    return folder


def test_lengths_are_those_of_the_data(tmp_path):
    folder = prepared(tmp_path / "data", [100, 200, 3000, 300], [10, 4000, 10, 30])
    lengths = Lengths.of(configuration(f"data.train={folder}"))
    assert lengths.prompts.tolist() == [100, 200, 300], "longer prompts are left out, as in a run"
    assert lengths.responses.tolist() == [10, 2048, 30], "a response ends at the limit"
    assert lengths.prompt_source == f"3 prompts of {folder}"
    reachable = Lengths.of(configuration(f"data.train={folder}", "data.require_reachable=true", "data.max_prompts=1"))
    assert (reachable.prompt, reachable.response) == (100.0, 10.0)
    asked = Lengths.of(configuration(f"data.train={folder}"), response=50)
    assert asked.prompts.tolist() == [100, 200, 300]
    assert asked.response == pytest.approx(50, abs=0.5)
    assert asked.response_source == "--mean-response"
    page = as_text(make_plan(configuration(f"data.train={folder}"), HARDWARE["h100"], world_size=4))
    assert f"3 prompts of {folder}" in page


def test_what_is_not_here_or_broken_is_said(tmp_path):
    absent = Lengths.of(configuration("data.train=/nowhere/data"))
    assert absent.prompt == pytest.approx(1024, abs=1)
    assert "/nowhere/data is not on this machine" in absent.prompt_source
    folder = prepared(tmp_path / "data", [100], [10])
    with (folder / "data-00000.arrow").open("ab") as file:
        file.write(b"more")
    assert "cannot be read" in Lengths.of(configuration(f"data.train={folder}")).prompt_source
    with pytest.raises(ConfigError, match="longer prompts are left out"):
        Lengths.of(configuration(), prompt=3000)


def test_drawn_samples_are_groups_of_the_right_lengths():
    lengths = Lengths(
        prompts=np.array([5, 9]), responses=np.array([2, 3, 4]), prompt_source="here", response_source="here"
    )
    samples = lengths.draw(10, group_size=4, seed=0)
    assert [s.group_id for s in samples] == [0] * 4 + [1] * 4 + [2] * 2
    for sample in samples:
        assert sample.prompt in (5, 9) and sample.response in (2, 3, 4)
        assert sample.first_loss == sample.prompt and sample.num_tokens == sample.prompt + sample.num_loss_tokens
    assert len({s.prompt for s in samples[:4]}) == 1, "siblings have one prompt"
