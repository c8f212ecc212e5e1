"""What each FP8 recipe needs of a machine, and what a given machine lacks.  Pure data and comparisons: no torch.

Hardware and blocks are Transformer Engine 2.20's (``quantization.py``: ``_compute_fp8_support`` and its siblings;
``assert_dim_for_fp8_exec``, ``is_quantizable``), versions of it Megatron-Core's (``fp8_utils.get_fp8_recipe``).  Least
CUDA of MXFP8 is that of the first Blackwell GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rest.config import Fp8Recipe

__all__ = ["REQUIREMENTS", "Machine", "Requirement", "why_not"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """Least versions of one recipe.  Versions are tuples of integers, ``(12, 9)`` for 12.9."""

    transformer_engine: tuple[int, ...]
    capability: tuple[int, int]  # CUDA compute capability of the GPU
    below_capability: tuple[int, int] | None = None  # first capability that cannot run it any more
    cuda: tuple[int, int]
    gpus: str  # the hardware in words
    block: int  # each dimension of a product, on each rank, is a multiple of it

    def describe(self) -> str:
        """The requirement as part of a sentence."""
        bound = f" and below {dotted(self.below_capability)}" if self.below_capability else ""
        return (
            f"Transformer Engine >= {dotted(self.transformer_engine)}, CUDA >= {dotted(self.cuda)} and a GPU of "
            f"compute capability >= {dotted(self.capability)}{bound} ({self.gpus})"
        )


REQUIREMENTS: Mapping[Fp8Recipe, Requirement] = {
    Fp8Recipe.DELAYED: Requirement(
        transformer_engine=(2, 1), capability=(8, 9), cuda=(12, 1), gpus="Ada, Hopper, Blackwell", block=16
    ),
    Fp8Recipe.TENSORWISE: Requirement(
        transformer_engine=(2, 2), capability=(8, 9), cuda=(12, 1), gpus="Ada, Hopper, Blackwell", block=16
    ),
    Fp8Recipe.BLOCKWISE: Requirement(
        transformer_engine=(2, 3), capability=(9, 0), cuda=(12, 9), gpus="Hopper: H100, H200; Blackwell", block=128
    ),
    Fp8Recipe.MXFP8: Requirement(
        transformer_engine=(2, 1),
        capability=(10, 0),
        below_capability=(12, 0),
        cuda=(12, 8),
        gpus="Blackwell: B200, GB200, B300",
        block=32,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a process sees.  Empty text: not there."""

    transformer_engine: str = ""  # version
    transformer_engine_fault: str = ""  # why it does not import although it is installed
    gpu: str = ""  # name of the device that this process uses
    capability: tuple[int, int] = (0, 0)
    cuda: str = ""  # version that torch was built with


def why_not(recipe: Fp8Recipe, machine: Machine) -> str | None:
    """Everything that keeps ``machine`` from ``recipe``, and what the recipe needs; None if it can run.

    >>> why_not(Fp8Recipe.BLOCKWISE, Machine(transformer_engine="2.20.2", gpu="H100", capability=(9, 0), cuda="12.8"))
    'torch is built with CUDA 12.8; blockwise needs Transformer Engine >= 2.3, CUDA >= 12.9 and a GPU of ...'
    """
    if recipe is Fp8Recipe.NONE:
        return None
    need = REQUIREMENTS[recipe]
    lacks = []
    if machine.transformer_engine_fault:
        lacks.append(f"Transformer Engine does not import ({machine.transformer_engine_fault})")
    elif not machine.transformer_engine:
        lacks.append("Transformer Engine is not installed")
    elif _version(machine.transformer_engine) < need.transformer_engine:
        lacks.append(f"Transformer Engine is {machine.transformer_engine}")
    if not machine.gpu:
        lacks.append("there is no CUDA device")
    else:
        if machine.capability < need.capability or (
            need.below_capability is not None and machine.capability >= need.below_capability
        ):
            lacks.append(f"{machine.gpu} has compute capability {dotted(machine.capability)}")
        if _version(machine.cuda) < need.cuda:
            lacks.append(f"torch is built with CUDA {machine.cuda}")
    return f"{' and '.join(lacks)}; {recipe} needs {need.describe()}" if lacks else None


def dotted(version: tuple[int, ...]) -> str:
    """(12, 9) -> 12.9"""
    return ".".join(map(str, version))


def _version(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: '2.20.2.dev0+abc' -> (2, 20, 2)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match.group().split("."))) if match else ()
