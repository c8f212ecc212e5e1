"""The sender's quantisation on a GPU gives the bytes that it gives on a CPU."""

from __future__ import annotations

import pytest
import torch

from megatron_rest.weight_sync.fp8 import quantise
from megatron_rest.weight_sync.layouts import Fp8Form

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", [(128, 128), (1, None), (16, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 1024), (130, 77)])
def test_the_same_bytes(
    shape: tuple[int, int], dtype: torch.dtype, block: tuple[int, int | None], power_of_two: bool
) -> None:
    form = Fp8Form(names=frozenset(), scale_suffix="_scale", block=block, power_of_two=power_of_two)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted, wanted_scale = quantise(matrix, form)
    got, scale = quantise(matrix.cuda(), form)
    assert torch.equal(scale.cpu(), wanted_scale)
    assert torch.equal(got.cpu().view(torch.uint8), wanted.view(torch.uint8))
