"""What a machine lacks for a recipe is named, together with what the recipe needs."""

from __future__ import annotations

import pytest

from megatron_rest.config import Fp8Recipe
from megatron_rest.fp8_support import REQUIREMENTS, Machine, why_not

TE = "2.20.2"
BARE = Machine()
H100 = Machine(transformer_engine=TE, gpu="NVIDIA H100 80GB HBM3", capability=(9, 0), cuda="13.0")
L40 = Machine(transformer_engine=TE, gpu="NVIDIA L40S", capability=(8, 9), cuda="13.0")
A100 = Machine(transformer_engine=TE, gpu="NVIDIA A100", capability=(8, 0), cuda="13.0")
B200 = Machine(transformer_engine=TE, gpu="NVIDIA B200", capability=(10, 0), cuda="13.0")
RTX5090 = Machine(transformer_engine=TE, gpu="NVIDIA GeForce RTX 5090", capability=(12, 0), cuda="13.0")

RUNS = {
    "H100": (H100, {"delayed", "tensorwise", "blockwise"}),
    "L40": (L40, {"delayed", "tensorwise"}),
    "A100": (A100, set()),
    "B200": (B200, {"delayed", "tensorwise", "blockwise", "mxfp8"}),
    "RTX5090": (RTX5090, {"delayed", "tensorwise", "blockwise"}),
    "bare": (BARE, set()),
}


@pytest.mark.parametrize("name", RUNS)
def test_recipes_of_a_machine(name: str) -> None:
    machine, expected = RUNS[name]
    assert {str(recipe) for recipe in REQUIREMENTS if why_not(recipe, machine) is None} == expected
    assert why_not(Fp8Recipe.NONE, machine) is None


@pytest.mark.parametrize(
    ("recipe", "machine", "parts"),
    [
        (
            "blockwise",
            BARE,
            ["Transformer Engine is not installed and there is no CUDA device", "CUDA >= 12.9", "H100"],
        ),
        ("mxfp8", H100, ["NVIDIA H100 80GB HBM3 has compute capability 9.0", ">= 10.0 and below 12.0", "B200"]),
        (
            "blockwise",
            Machine(transformer_engine="2.2.0", gpu="H100", capability=(9, 0), cuda="12.8"),
            ["Transformer Engine is 2.2.0 and torch is built with CUDA 12.8", "Transformer Engine >= 2.3"],
        ),
        (
            "delayed",
            Machine(transformer_engine=TE, transformer_engine_fault="cudnn shared object not found"),
            ["does not import (cudnn shared object not found)", "no CUDA device"],
        ),
    ],
)
def test_what_is_missing_and_what_is_needed(recipe: str, machine: Machine, parts: list[str]) -> None:
    text = why_not(Fp8Recipe(recipe), machine)
    assert text is not None
    assert f"; {recipe} needs " in text
    for part in parts:
        assert part in text
