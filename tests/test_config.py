"""The configuration tree: files, overrides, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rest.config import (
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RestConfig,
    WeightSource,
    from_dict,
    load,
    to_dict,
    validate,
)

SECTIONS = [field.name for field in dataclasses.fields(RestConfig)]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_are_a_valid_run() -> None:
    validate(RestConfig(), world_size=1)
    assert load() == RestConfig()


def test_yaml_round_trip_keeps_every_field() -> None:
    config = load(None, ["weighting.source=entropy_ema", "loss.dual_clip=3", "optimizer.lr=3e-7"])
    assert from_dict(RestConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_fp8_needs_bfloat16_and_fp8_weights_need_their_masters() -> None:
    recipe = ["precision.recipe=blockwise"]
    with pytest.raises(ConfigError, match=r"model\.dtype is float32"):
        validate(load(overrides=recipe), world_size=1)
    validate(load(overrides=[*recipe, "model.dtype=bfloat16", "precision.bf16_layers_end=2"]), world_size=1)
    weights = [*recipe, "model.dtype=bfloat16", "precision.parameters=true"]
    with pytest.raises(ConfigError, match="distributed_optimizer"):
        validate(load(overrides=weights), world_size=1)
    validate(load(overrides=[*weights, "parallel.distributed_optimizer=true"]), world_size=1)
    with pytest.raises(ConfigError, match="do not go with the delayed recipe"):
        load(overrides=["precision.recipe=delayed", "precision.bf16_layers_start=1"])


def test_published_weights_have_no_sum_known_before_the_step() -> None:
    weights = ["weighting.source=reference_code"]
    validate(load(overrides=weights), world_size=1)
    validate(load(overrides=[*weights, "loss.aggregation=reference_code"]), world_size=1)
    with pytest.raises(ConfigError, match=r"set loss\.aggregation to sequence_mean"):
        validate(load(overrides=[*weights, "loss.aggregation=token_mean"]), world_size=1)


def test_a_file_lies_over_the_base_and_overrides_over_the_file(tmp_path: Path) -> None:
    base = RestConfig(optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.3, clip_grad=2.0))
    path = write(tmp_path, "optimizer:\n  lr: 1e-4\n  weight_decay: 0.2\n")
    optimizer = load(path, ["optimizer.lr=1e-5"], base=base).optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad) == (1e-5, 0.2, 2.0)
    assert base.optimizer.lr == 1e-3


@pytest.mark.parametrize("text", ["", "# nothing\n", "optimizer:\n", "{}"])
def test_an_empty_file_or_section_changes_nothing(text: str, tmp_path: Path) -> None:
    base = RestConfig(optimizer=OptimizerConfig(lr=0.5))
    assert load(write(tmp_path, text), base=base) == base


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown configuration key optimizer.lrr: did you mean optimizer.lr?"),
        ("optimzer.lr=1", "unknown configuration key optimzer: did you mean optimizer?"),
        ("lr=1", "did you mean optimizer.lr or warm_start.lr?"),
        ("loss.temperature=1", "did you mean rollout.temperature?"),
        ("loss.qqqq=1", "known keys: aggregation"),
        ("optimizer.lr", "not of the form section.key=value"),
        ("optimizer.lr=fast", "optimizer.lr must be float, got 'fast'"),
        ("optimizer.lr=true", "optimizer.lr must be float, got True"),
        ("optimizer.lr=nan", "optimizer.lr is not a number"),
        ("optimizer.lr=[", "not valid YAML"),
        ("trainer.steps=2.5", "trainer.steps must be int, got 2.5"),
        ("trainer.steps=yes", "trainer.steps must be int, got True"),
        ("trainer.steps=null", "trainer.steps must be int, got None"),
        ("checkpoint.export_hf=1", "checkpoint.export_hf must be bool"),
        ("weighting.source=constnt", "did you mean constant?"),
        ("precision.recipe=mxfp", "did you mean mxfp8?"),
        ("precision.max_mismatch=0", "precision.max_mismatch is 0.0, expected a finite number > 0"),
        ("precision.amax_history=0", "precision.amax_history is 0, expected at least 1"),
        ("precision.parameters=true", "precision.recipe is none"),
        ("model.dtype=fp64", "model.dtype is 'fp64'"),
        ("trainer.steps=0", "trainer.steps is 0, expected at least 1"),
        ("rollout.temperature=0", "rollout.temperature is 0"),
        ("rollout.top_p=1.5", "rollout.top_p is 1.5"),
        ("loss.dual_clip=1", "loss.dual_clip is 1"),
        ("parallel.virtual_pipeline=2", "needs parallel.pipeline_parallel > 1"),
        ("model=3", "not of the form section.key=value"),
        ("model.path.deep=1", "unknown configuration key model.path.deep: did you mean model.path?"),
    ],
)
def test_a_wrong_override_is_one_line_that_says_how_to_mend_it(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping of sections, got list"),
        ("optimizer: 3\n", "optimizer must be a mapping, got int"),
        ("optimizer: 0\n", "optimizer must be a mapping, got int"),
        ("optimizer: [\n", "is not valid YAML"),
        ("optimiser:\n  lr: 1\n", "did you mean optimizer?"),
        ("trainer:\n  seed: a\n", "trainer.seed must be int, got 'a'"),
    ],
)
@pytest.mark.parametrize("base", [None, RestConfig()])
def test_a_wrong_file_is_one_line_that_names_the_place(
    text: str, message: str, base: RestConfig | None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, text), base=base)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read configuration .*missing\.yaml: No such file"):
        load(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml is not valid YAML"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("text", ["2026-11-23", "007", "null", "a=b", "yes", "", " x ", "[1", "#5", "1e-6"])
def test_text_fields_take_the_text_as_it_is(text: str) -> None:
    assert load(None, [f"model.path={text}"]).model.path == text


@settings(deadline=None)  # the machine's load is not the test's business
@given(st.floats(min_value=1e-12, max_value=1e3))
def test_every_way_of_writing_a_number_is_read(value: float) -> None:
    for text in (repr(value), f"{value:e}", f"{value:.17g}"):
        assert load(None, [f"optimizer.lr={text}"]).optimizer.lr == float(text)


def test_values_get_the_fields_types() -> None:
    config = load(None, ["optimizer.lr=1", "loss.tis_cap=2", "loss.dual_clip=null", "weighting.source=uniform"])
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (1.0, float)
    assert (config.loss.tis_cap, type(config.loss.tis_cap)) == (2.0, float)
    assert config.loss.dual_clip is None
    assert config.weighting.source is WeightSource.UNIFORM


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        (["parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"], 6, "start a multiple of 4 ranks"),
        (["optimizer.updates_per_step=3"], 1, "128 rollouts a step do not split"),
        (["optimizer.updates_per_step=128"], 2, "1 rollouts per optimiser step are fewer than 2"),
        (["rollout.max_response_tokens=1025"], 1, "exceeds model.max_sequence_length 2048"),
        (["trainer.max_tokens_per_microbatch=1000"], 1, "smaller than one sequence may be (1280 tokens)"),
        (["parallel.sequence_parallel=true"], 1, "parallel.tensor_parallel is 1: set parallel.sequence_parallel=false"),
        (
            ["megatron.ddp.overlap_param_gather=true", "megatron.ddp.overlap_grad_reduce=true"],
            2,
            "needs parallel.distributed_optimizer=true and megatron.ddp.overlap_grad_reduce=true",
        ),
        (
            ["megatron.ddp.overlap_param_gather=true", "parallel.distributed_optimizer=true"],
            2,
            "needs parallel.distributed_optimizer=true and megatron.ddp.overlap_grad_reduce=true",
        ),
    ],
)
def test_what_needs_two_sections_is_checked_together(changes: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(load(None, changes), world_size=world_size)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_data_parallel_is_what_is_left_of_the_world() -> None:
    layout = ParallelConfig(tensor_parallel=2, pipeline_parallel=2)
    assert [layout.data_parallel(world) for world in (4, 8, 32)] == [1, 2, 8]


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RestConfig().model.path = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig("positional")  # type: ignore[misc]


def test_every_field_has_a_sentence_and_a_default() -> None:
    source = (Path(__file__).parents[1] / "megatron_rest/config.py").read_text()
    for section in SECTIONS:
        cls: Any = type(getattr(RestConfig(), section))
        body = re.split(r"\n@dataclass|\ndef ", source.split(f"class {cls.__name__}:")[1])[0]
        for field in dataclasses.fields(cls):
            assert re.search(rf"\n    {field.name}: [^\n]+\n    \"\"\"[^\n]+", body), f"{section}.{field.name}"
            assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def test_importing_the_configuration_imports_no_torch() -> None:
    code = "import sys, megatron_rest.config; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.top_p=0.9"], "nothing corrects for it: set loss.tis_cap=2.0"),
        (["rollout.top_k=20"], "rollout.top_k=20"),
        (["loss.kl_coef=0.1", "trainer.replay_every=2"], "without a reference policy"),
        (
            ["loss.kl_coef=0.1", "precision.recipe=blockwise", "precision.parameters=true", "model.dtype=bfloat16",
             "parallel.distributed_optimizer=true"],
            "FP8 parameters cannot change places",
        ),
    ],
)  # fmt: skip
def test_objectives_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load(None, ["model.path=/m", *overrides]), world_size=1)


@pytest.mark.parametrize("overrides", [["loss.kl_coef=0.1"], ["rollout.top_p=0.9", "loss.tis_cap=2.0"]])
def test_and_those_that_can_are_taken(overrides: list[str]) -> None:
    validate(load(None, ["model.path=/m", *overrides]), world_size=1)
