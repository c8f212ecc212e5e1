"""FP8 through Transformer Engine: what the ``precision`` section means to Megatron, and what RL adds to it.

Megatron enters the recipe around the transformer layers by itself (``TransformerBlock.forward``); embedding and output
layer stay outside, in BF16.  What is left to us:

* settings of the three configurations that have to agree (:func:`transformer_settings`, :func:`ddp_settings`,
  :func:`optimizer_settings`), and refusals that come before a kernel fails (:func:`require`; sizes: ``model_fit``);
* FP8 parameters start from the loaded weights, not from what the constructor drew (:func:`master_values`,
  :func:`fit_weight_scales`);
* the scoring pass leaves no trace in the scales of the training pass (:func:`untouched_scales`);
* the same model in BF16, to compare with (:func:`without_fp8`).

Delayed scaling is the one recipe with a memory: a tensor is cast with a scale made from the maxima of earlier passes.
Every cast writes its maximum into row 0 of a history, also without gradients; leaving a *training* forward pass rolls
the history on.  So a scoring pass between two training passes would mix its maxima into row 0 of the next one.  And
before the first training pass every scale is 1, where e4m3 has a step of 0.002, much too coarse for weights:
:func:`settle_scales` gives scales their first values.  The other recipes scale each tensor by itself; here all of this
does nothing for them.

Transformer Engine's interface used here: ``module.fp8_meta["scaling_fwd" | "scaling_bwd"].scale / .amax_history``,
``FP8GlobalStateManager.reduce_and_update_fp8_tensors``, ``parameter.get_high_precision_init_val``,
``parameter._quantizer.scale`` (2.1 to 2.20).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_rest.config import ConfigError, Fp8Recipe, PrecisionConfig
from megatron_rest.fp8_support import Machine, why_not
from megatron_rest.help_topics import Topic, see

__all__ = [
    "ddp_settings",
    "dequantised",
    "fit_weight_scales",
    "master_values",
    "optimizer_settings",
    "require",
    "settle_scales",
    "this_machine",
    "transformer_settings",
    "untouched_scales",
    "without_fp8",
]

_INPUT = 0  # a layer's input comes first among the scales of its forward pass, the gradient of its output backward
_E4M3_MAX = 448.0  # largest finite e4m3 value: weights are e4m3 in both formats


def this_machine() -> Machine:
    """Transformer Engine and the CUDA device of this process."""
    version, fault = "", ""
    try:
        version = importlib.import_module("transformer_engine").__version__
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        fault = "" if error.name == "transformer_engine" else str(error)
    except (RuntimeError, OSError) as error:  # its loader's way to say that a library is missing
        fault = " ".join(str(error).split())
    has_gpu = torch.cuda.is_available()
    return Machine(
        transformer_engine=version,
        transformer_engine_fault=fault,
        gpu=torch.cuda.get_device_name() if has_gpu else "",
        capability=torch.cuda.get_device_capability() if has_gpu else (0, 0),
        cuda=torch.version.cuda or "",
    )


def require(recipe: Fp8Recipe, machine: Machine) -> None:
    """Raises :class:`ConfigError` that says what ``machine`` lacks and what the recipe needs."""
    obstacle = why_not(recipe, machine)
    if obstacle is not None:
        raise ConfigError(
            f"precision.recipe={recipe} cannot run here: {obstacle}. Set precision.recipe=none to train in BF16, or "
            f"see `megatron-rest doctor`{see(Topic.FP8_CERTIFICATE)}"
        )


def transformer_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron's ``TransformerConfig`` (0.16 to 0.19); empty without FP8."""
    if precision.recipe is Fp8Recipe.NONE:
        return {}
    return {
        "fp8": precision.format,
        "fp8_recipe": str(precision.recipe),
        "fp8_param": precision.parameters,
        "fp8_margin": precision.margin,
        "fp8_amax_history_len": precision.amax_history,
        "fp8_amax_compute_algo": precision.amax_algorithm,
        "first_last_layers_bf16": bool(precision.bf16_layers_start or precision.bf16_layers_end),
        "num_layers_at_start_in_bf16": precision.bf16_layers_start,
        "num_layers_at_end_in_bf16": precision.bf16_layers_end,
    }


def ddp_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of ``DistributedDataParallelConfig``; empty without FP8 parameters.

    MXFP8 weights have one layout for rows and one for columns, so they are gathered in BF16 through the gradient buffer
    and quantised on arrival; Megatron has no other way for them.
    """
    if not precision.parameters:
        return {}
    return {
        "fp8_param_gather": True,
        "reuse_grad_buf_for_mxfp8_param_ag": precision.recipe is Fp8Recipe.MXFP8,
    }


def optimizer_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron's ``OptimizerConfig``; empty without FP8."""
    if precision.recipe is Fp8Recipe.NONE:
        return {}
    return {
        "fp8_recipe": str(precision.recipe),
        "reuse_grad_buf_for_mxfp8_param_ag": precision.parameters and precision.recipe is Fp8Recipe.MXFP8,
    }


def master_values(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of FP8 parameters: the BF16 tensors (on the CPU) that the optimiser will make its float32 masters of.

    Transformer Engine keeps what the constructor drew.  Whoever loads weights into the parameters has to load them
    here too, or the first optimiser step replaces the loaded model by the random one.
    """
    values = {}
    for name, parameter in parameters.items():
        get = getattr(parameter, "get_high_precision_init_val", None)
        value = get() if get is not None else None
        if value is not None:
            values[name] = value
    return values


@torch.no_grad()
def fit_weight_scales(parameters: Mapping[str, Tensor], masters: Mapping[str, Tensor], *, margin: int = 0) -> None:
    """Delayed scaling: FP8 parameters get the scale ``448 / max|w| / 2^margin`` before values are copied in.

    Other recipes scale at the copy and are left alone: their quantisers hold no scale tensor.
    """
    for name, master in masters.items():
        quantizer = getattr(parameters[name], "_quantizer", None)
        scale = getattr(quantizer, "scale", None)
        largest = master.abs().max().float()
        if isinstance(scale, Tensor) and largest > 0:
            scale.fill_(_E4M3_MAX / float(largest) / 2**margin)


def dequantised(tensor: Tensor) -> Tensor:
    """A BF16 copy of one of Transformer Engine's FP8 tensors; any other tensor as it is."""
    from megatron.core.fp8_utils import is_float8tensor

    return tensor.dequantize() if is_float8tensor(tensor) else tensor


@contextmanager
def untouched_scales(modules: Iterable[Any]) -> Iterator[None]:
    """Whatever runs inside, the delayed scales and histories of ``modules`` are as before when it is over.

    State that appears inside (a module's first FP8 pass) is put back to what Transformer Engine starts from: scales of
    1 and an empty history.  Costs a copy of the histories; nothing for recipes without a memory.
    """
    modules = list(modules)
    before = [(tensor, tensor.clone()) for tensor in _scale_tensors(modules)]
    known = {id(tensor) for tensor, _ in before}
    try:
        yield
    finally:
        with torch.no_grad():
            for state in _delayed_states(modules):
                if id(state.scale) not in known:
                    state.scale.fill_(1.0)
                    state.amax_history.zero_()
            for tensor, value in before:
                tensor.copy_(value)


@torch.no_grad()
def settle_scales(modules: Sequence[Any], forward: Callable[[], object]) -> None:
    """Delayed scaling: give scales their first values by running ``forward()`` without gradients.

    The first pass runs on scales of 1: what it sees of activations is distorted, and forgotten.  The second runs on
    scales that fit and is what the history begins with.  Scales that training or a checkpoint has moved already are
    left as they are.  Gradient scales stay 1 until the first backward pass.

    Collectives: those of ``forward``, and one MAX all-reduce a pass over Megatron's amax group; every rank calls it.
    Raises RuntimeError if the model shows no delayed scales: this Transformer Engine keeps them elsewhere.
    """
    if any(float(state.scale[_INPUT]) != 1.0 for state in _delayed_states(modules)):
        return
    for is_last in (False, True):
        forward()
        states = list(_delayed_states(modules))
        if not states:
            raise RuntimeError(
                "delayed scaling is on, but no module has fp8_meta['scaling_fwd'].amax_history after a forward pass: "
                "this Transformer Engine is not one of 2.1 to 2.20; use precision.recipe=tensorwise"
            )
        _state_manager().reduce_and_update_fp8_tensors(forward=True)
        if not is_last:
            for state in states:
                state.amax_history.zero_()


@contextmanager
def without_fp8(modules: Iterable[Any]) -> Iterator[None]:
    """The same weights without FP8 products: Megatron reads ``config.fp8`` at the start of every forward pass.

    FP8 parameters are dequantised by Transformer Engine for the occasion, so their rounding is on both sides of a
    comparison.
    """
    configs = {id(config): config for module in modules for config in _configs(module)}
    before = [(config, config.fp8) for config in configs.values()]
    try:
        for config, _ in before:
            config.fp8 = None
        yield
    finally:
        for config, fp8 in before:
            config.fp8 = fp8


def _configs(module: Any) -> Iterator[Any]:
    for part in module.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "fp8"):
            yield config


def _delayed_states(modules: Iterable[Any]) -> Iterator[Any]:
    """The states with a history: those of delayed scaling."""
    for module in modules:
        for part in module.modules():
            meta = getattr(part, "fp8_meta", None) or {}
            for direction in ("scaling_fwd", "scaling_bwd"):
                state = meta.get(direction)
                if isinstance(getattr(state, "amax_history", None), Tensor):
                    yield state


def _scale_tensors(modules: Iterable[Any]) -> Iterator[Tensor]:
    for state in _delayed_states(modules):
        yield state.scale
        yield state.amax_history


def _state_manager() -> Any:
    # The module that Megatron-Core itself takes it from.
    return importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
