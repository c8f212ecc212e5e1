"""Checkpoints in FP8, and a stand-in for the kernel that vLLM's CPU build lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_rest.config import RolloutQuantization
from megatron_rest.rollout.vllm_engine import _quantization_config
from megatron_rest.weight_sync.fp8 import quantise
from megatron_rest.weight_sync.layouts import Fp8Form
from tests.helpers.tiny_model import read_config

__all__ = ["FORMS", "dequantised", "form_of", "fp8_reference", "stand_in_for_block_kernels", "write_fp8_checkpoint"]

FORMS: dict[RolloutQuantization, tuple[str, tuple[int, int | None]]] = {
    RolloutQuantization.FP8_CHANNEL: ("_scale", (1, None)),
    RolloutQuantization.FP8_BLOCK: ("_scale_inv", (128, 128)),
}


def form_of(quantization: RolloutQuantization, names: Any) -> Fp8Form:
    """Of the matrices of the layers among ``names``: all but norms, routers, embedding and head."""
    matrices = frozenset(n for n in names if n.endswith("_proj.weight"))
    suffix, block = FORMS[quantization]
    return Fp8Form(names=matrices, scale_suffix=suffix, block=block)


def write_fp8_checkpoint(
    source: Path, folder: Path, state: dict[str, torch.Tensor], quantization: RolloutQuantization
) -> Path:
    """``state`` as a checkpoint in FP8, as hubs have them; the rest of its configuration is that of ``source``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = read_config(source)
    config["quantization_config"] = _quantization_config(quantization, config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    form = form_of(quantization, state)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name in form.names:
            tensors[name], tensors[form.scale_name(name)] = quantise(tensor, form)
        else:
            tensors[name] = tensor
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dequantised(quantised: torch.Tensor, scale: torch.Tensor, block: tuple[int, int | None]) -> torch.Tensor:
    """float64; element by element, independently of how :func:`quantise` sees blocks."""
    rows = torch.arange(quantised.shape[0]) // block[0]
    columns = torch.arange(quantised.shape[1]) // (block[1] or quantised.shape[1])
    return quantised.double() * scale.double()[rows][:, columns]


def stand_in_for_block_kernels(monkeypatch: Any) -> None:
    """vLLM's CPU kernels for blocks want AMX; where there is none this one multiplies with dequantised weights.

    All around it is vLLM's: parameters, loaders, reload.
    """
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.platforms import current_platform

    class DequantisingStandIn(Fp8BlockScaledMMLinearKernel):
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(
            self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
        ) -> torch.Tensor:
            block = self.weight_group_shape
            return A @ dequantised(B, Bs, (block.row, block.col)).to(A.dtype).t()

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS
    monkeypatch.setitem(kernels, current_platform._enum, [DequantisingStandIn])


def fp8_reference(model: Any, form: Fp8Form, *, quantise_inputs: bool) -> Any:
    """A transformers model that computes what an engine in FP8 does, in its own precision.

    Its matrices are rounded to FP8 and back; with ``quantise_inputs`` what they multiply is, too, by token, as vLLM's
    kernels for channels do.
    """

    def rounded(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = inputs
        scale = x.abs().amax(-1, keepdim=True).float() / 448
        return (((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype),)

    with torch.no_grad():
        for name, module in model.named_modules():
            if f"{name}.weight" in form.names:
                module.weight.copy_(dequantised(*quantise(module.weight, form), form.block))
                if quantise_inputs:
                    module.register_forward_pre_hook(rounded)
    return model
