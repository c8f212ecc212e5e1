"""Staging memory: never lent twice at a time, kept from one transfer to the next."""

from __future__ import annotations

import torch

from megatron_rest.weight_sync.staging import Staging


def test_a_block_comes_back_with_its_last_view_and_not_before() -> None:
    staging = Staging(torch.device("cpu"))
    first = staging.empty(4096)
    address = first.data_ptr()
    view = first.view(torch.float32).view(32, 32)[3:, 4]  # what a model's loader may keep
    view.fill_(1.5)
    del first
    second = staging.empty(4096)
    assert second.data_ptr() != address
    second.fill_(0xFF)
    assert (view == 1.5).all()
    del view
    assert staging.empty(4096).data_ptr() == address
    assert staging.num_bytes == 2 * 4096, "the third one was the first one's memory"
    other = staging.empty(64)
    other.zero_()
    assert staging.num_bytes == 2 * 4096 + 64 and (second == 0xFF).all()


def test_what_is_lent_outlives_the_staging() -> None:
    staging = Staging(torch.device("cpu"))
    kept = staging.empty(1 << 20).fill_(7)
    del staging
    assert (kept == 7).all()
