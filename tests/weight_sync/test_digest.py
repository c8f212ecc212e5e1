"""The digest notices every single flipped byte and words that change places."""

from __future__ import annotations

import pytest
import torch

from megatron_rest.weight_sync.digest import digest


@pytest.mark.parametrize("num_bytes", [1, 7, 8, 9, 4096, 8192, 8192 + 24 + 3])
def test_every_flipped_byte_is_noticed(num_bytes: int) -> None:
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = digest(data)
    positions = range(num_bytes) if num_bytes < 100 else [0, 1, num_bytes // 2 + 3, num_bytes - 1]
    for position in positions:
        for mask in (0x01, 0x80, 0xFF):
            broken = data.clone()
            broken[position] ^= mask
            assert digest(broken)[0] != before[0], (position, mask)
    assert digest(data.clone()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_order_counts_and_layout_does_not(dtype: torch.dtype) -> None:
    tensor = torch.randn(96, 130).to(dtype) if dtype.is_floating_point else torch.arange(96 * 130).view(96, 130)
    assert digest(tensor) != digest(tensor.flip(0))
    assert digest(tensor) != digest(tensor.roll(1, 0))
    assert digest(tensor) == digest(tensor.t().contiguous().t())  # a strided view of the same values
    # ... and a view that does not start on a word
    raw = torch.cat([torch.zeros(3, dtype=torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)])
    assert digest(raw[3:]) == digest(tensor)


def test_not_a_number_is_only_bytes() -> None:
    assert digest(torch.full((5,), float("nan"))) == digest(torch.full((5,), float("nan")))
