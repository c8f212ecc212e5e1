"""FP8: Megatron's settings, refusals, and scales.

Transformer Engine does not run here: the bookkeeping of delayed scaling is tested with the stand-in of
``tests/helpers/delayed_scaling.py``; settings go into the installed Megatron-Core's own configuration classes.
``test_fp8_on_gpu.py`` has the same with the real one.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rest.config import ConfigError, Fp8Recipe, PrecisionConfig, load
from megatron_rest.mcore import accelerations, build, precision
from tests.helpers.delayed_scaling import DelayedLinear, StateManager

RECIPES = [recipe for recipe in Fp8Recipe if recipe is not Fp8Recipe.NONE]


def settings_of(**fields: Any) -> PrecisionConfig:
    return PrecisionConfig(**fields)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_installed_megatron_takes_the_settings(recipe: Fp8Recipe) -> None:
    keeps_layers = recipe is not Fp8Recipe.DELAYED
    section = settings_of(
        recipe=recipe,
        format="e4m3",
        parameters=True,
        margin=1,
        amax_history=16,
        amax_algorithm="most_recent",
        bf16_layers_start=int(keeps_layers),
        bf16_layers_end=2 * int(keeps_layers),
    )
    transformer = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **precision.transformer_settings(section)
    )
    assert (transformer.fp8, transformer.fp8_recipe, transformer.fp8_param) == ("e4m3", recipe, True)
    assert (transformer.fp8_margin, transformer.fp8_amax_history_len) == (1, 16)
    assert transformer.fp8_amax_compute_algo == "most_recent"
    assert transformer.first_last_layers_bf16 is keeps_layers
    if keeps_layers:
        assert (transformer.num_layers_at_start_in_bf16, transformer.num_layers_at_end_in_bf16) == (1, 2)
    is_mxfp8 = recipe is Fp8Recipe.MXFP8
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, **precision.ddp_settings(section))
    assert (ddp.fp8_param_gather, ddp.reuse_grad_buf_for_mxfp8_param_ag) == (True, is_mxfp8)
    optimizer = OptimizerConfig(use_distributed_optimizer=True, **precision.optimizer_settings(section))
    assert (optimizer.fp8_recipe, optimizer.reuse_grad_buf_for_mxfp8_param_ag) == (recipe, is_mxfp8)


def test_without_fp8_megatron_gets_nothing() -> None:
    section = PrecisionConfig()
    assert precision.transformer_settings(section) == precision.ddp_settings(section) == {}
    assert precision.optimizer_settings(section) == {}


def test_megatrons_bf16_layers_are_those_of_the_configuration() -> None:
    """Megatron's own rule, on Megatron's own configuration object."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    section = settings_of(recipe=Fp8Recipe.TENSORWISE, bf16_layers_start=2, bf16_layers_end=1)
    transformer = TransformerConfig(
        num_layers=6, hidden_size=64, num_attention_heads=4, bf16=True, **precision.transformer_settings(section)
    )
    assert [i for i in range(6) if is_first_last_bf16_layer(transformer, i)] == [0, 1, 5]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_that_cannot_run_is_refused_before_anything_starts(recipe: Fp8Recipe) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: test_fp8_on_gpu.py runs what it can")
    with pytest.raises(ConfigError) as error:
        build.initialize(load(overrides=[f"precision.recipe={recipe}", "model.dtype=bfloat16"]))
    text = str(error.value)
    assert f"precision.recipe={recipe} cannot run here: Transformer Engine is not installed" in text
    assert "no CUDA device" in text
    assert f"{recipe} needs Transformer Engine >= 2." in text
    assert not torch.distributed.is_initialized()


# --- delayed scaling, on the stand-in ---------------------------------------------------------------------------------


def inputs(count: int, *, seed: int, size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(8, 16, generator=generator) for _ in range(count)]


def train(layer: DelayedLinear, manager: StateManager, steps: list[torch.Tensor], between: Any) -> list[torch.Tensor]:
    """Scales after every training pass; ``between(i)`` runs before each."""
    scales = []
    for i, x in enumerate(steps):
        between(i)
        with manager.autocast():
            layer(x).sum().backward()
        scales.append(layer.fp8_meta["scaling_fwd"].scale.clone())
    return scales


def test_scoring_leaves_no_trace_in_the_scales_of_training() -> None:
    steps, larger = inputs(6, seed=0), inputs(6, seed=1, size=50.0)

    def run(scoring: Any) -> list[torch.Tensor]:
        manager = StateManager()
        layer = DelayedLinear(16, manager)

        def between(i: int) -> None:
            if scoring is not None:
                with torch.no_grad(), scoring([layer]), manager.autocast():
                    layer(larger[i])

        return train(layer, manager, steps, between)

    alone = run(None)
    kept_apart = run(precision.untouched_scales)
    for with_scoring, expected in zip(kept_apart, alone, strict=True):
        assert torch.equal(with_scoring, expected)
    mixed = run(lambda modules: nullcontext())
    assert not torch.equal(mixed[0], alone[0])  # what it guards against is real


def test_scoring_uses_the_scales_of_training() -> None:
    manager = StateManager()
    layer = DelayedLinear(16, manager)
    train(layer, manager, inputs(3, seed=0), lambda i: None)
    [x] = inputs(1, seed=5)
    with torch.no_grad():
        expected = layer(x)
    train(layer, manager, [], lambda i: None)
    with torch.no_grad(), precision.untouched_scales([layer]):
        assert torch.equal(layer(x), expected)


def test_state_is_restored_when_scoring_fails() -> None:
    manager = StateManager()
    layer = DelayedLinear(16, manager)
    train(layer, manager, inputs(2, seed=0), lambda i: None)
    before = layer.fp8_meta["scaling_fwd"].amax_history.clone()
    with pytest.raises(RuntimeError, match="interrupted"), torch.no_grad(), precision.untouched_scales([layer]):
        layer(100 * torch.ones(1, 16))
        raise RuntimeError("interrupted")
    assert torch.equal(layer.fp8_meta["scaling_fwd"].amax_history, before)


def test_first_scales_come_from_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = StateManager()
    monkeypatch.setattr(precision, "_state_manager", lambda: manager)
    layers = torch.nn.Sequential(DelayedLinear(16, manager, seed=1), DelayedLinear(16, manager, seed=2))
    [x] = inputs(1, seed=3)
    exact = x @ layers[0].weight.t() @ layers[1].weight.t()

    def error() -> float:
        with torch.no_grad(), precision.untouched_scales(layers):
            return float((layers(x) - exact).norm() / exact.norm())

    unsettled = error()
    precision.settle_scales([layers], lambda: layers(x))
    assert error() < 0.06 < 0.2 < unsettled
    second = layers[1].fp8_meta["scaling_fwd"]
    seen = (x @ layers[0].weight.t()).abs().max()
    assert second.amax_history.max() == pytest.approx(float(seen), rel=0.05)  # not the distorted first pass's
    scales = second.scale.clone()
    assert scales[0] != 1
    precision.settle_scales([layers], lambda: layers(1000 * x))
    assert torch.equal(second.scale, scales), "scales that have a history are left alone"


def test_an_engine_that_keeps_its_scales_elsewhere_is_reported() -> None:
    with pytest.raises(RuntimeError, match="no module has fp8_meta"):
        precision.settle_scales([torch.nn.Linear(2, 2)], lambda: None)


def test_bf16_for_the_length_of_a_block_on_megatrons_configuration() -> None:
    section = settings_of(recipe=Fp8Recipe.TENSORWISE)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, bf16=True, **precision.transformer_settings(section)
    )
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    model.config = model[1].config = config  # type: ignore[assignment]
    with precision.without_fp8([model]):
        assert config.fp8 is None
    assert config.fp8 == "hybrid"
    with pytest.raises(RuntimeError, match="x"), precision.without_fp8([model]):
        raise RuntimeError("x")
    assert config.fp8 == "hybrid"


# --- FP8 parameters, on a stand-in of Transformer Engine's parameter -------------------------------------------------


def fp8_parameter(drawn: torch.Tensor, *, scale: torch.Tensor | None) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(drawn.clone())
    master = drawn.clone()
    parameter.get_high_precision_init_val = lambda: master  # type: ignore[attr-defined]
    parameter._quantizer = SimpleNamespace(scale=scale)  # type: ignore[attr-defined]
    return parameter


def test_masters_of_fp8_parameters_are_the_ones_to_load_into() -> None:
    fp8 = fp8_parameter(torch.zeros(2, 2), scale=None)
    consumed = torch.nn.Parameter(torch.zeros(1))
    consumed.get_high_precision_init_val = lambda: None  # type: ignore[attr-defined]
    named = {"a": fp8, "b": torch.nn.Parameter(torch.zeros(3)), "c": consumed}
    masters = precision.master_values(named)
    assert list(masters) == ["a"]
    masters["a"].fill_(7.0)
    assert fp8.get_high_precision_init_val().eq(7.0).all()  # type: ignore[attr-defined]


def test_delayed_weights_are_scaled_to_the_range_of_e4m3() -> None:
    scale = torch.ones(1)
    named = {
        "delayed": fp8_parameter(torch.zeros(2), scale=scale),
        "current": fp8_parameter(torch.zeros(2), scale=None),
    }
    masters = precision.master_values(named)
    for master in masters.values():
        master.copy_(torch.tensor([0.25, -0.5]))
    precision.fit_weight_scales(named, masters, margin=1)
    assert scale.item() == 448.0
    masters["delayed"].zero_()
    precision.fit_weight_scales(named, masters)
    assert scale.item() == 448.0, "an all-zero weight says nothing"


class Quantised(torch.Tensor):
    """Stand-in for Transformer Engine's ``QuantizedTensor``: what it holds is not what it stands for."""

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        return 2 * self.as_subclass(torch.Tensor)


def test_fp8_parameters_leave_the_policy_as_plain_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import fp8_utils

    from megatron_rest.mcore.policy import _Shards

    monkeypatch.setattr(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True)
    monkeypatch.setattr(fp8_utils, "FP8_TENSOR_CLASS", Quantised)
    plain = torch.nn.Parameter(torch.ones(2))
    fp8 = torch.nn.Parameter(torch.ones(2).as_subclass(Quantised))
    shards = _Shards({"plain": plain, "fp8": fp8})
    assert list(shards) == ["plain", "fp8"] and len(shards) == 2
    assert type(shards["fp8"]) is torch.Tensor and shards["fp8"].tolist() == [2.0, 2.0]
    shards["plain"].fill_(5.0)
    assert plain.tolist() == [5.0, 5.0], "plain shards are live"


def test_weight_gradient_fusion_switches_what_has_the_switch() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].fuse_wgrad_accumulation = False  # type: ignore[assignment]
    assert accelerations.fuse_weight_gradients(model) == 1
    assert model[1].fuse_wgrad_accumulation is True
    assert not hasattr(model[0], "fuse_wgrad_accumulation")


def test_description_says_what_runs_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = accelerations.active()
    assert str(found) == (
        "layers: Megatron's local layers, torch norms; optimiser: torch AdamW; "
        "weight gradients: added after the product"
    )
    assert not (found.are_layers_fused or found.is_optimizer_fused or found.are_weight_gradients_fused)
