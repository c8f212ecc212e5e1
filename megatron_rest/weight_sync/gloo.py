"""What the two ends of the ``gloo`` transport share: one process group of their own and one way of cutting buckets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch

__all__ = ["bucket_ranges", "join_group", "num_bytes"]


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor."""
    return dtype.itemsize * torch.Size(shape).numel()


def bucket_ranges(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Ranges of consecutive tensors, closed once they reach ``limit`` bytes.

    Sender and receivers cut with this from the same metadata, so the cuts agree without a handshake.
    """
    start, total = 0, 0
    for index, size in enumerate(sizes):
        total += size
        if total >= limit:
            yield range(start, index + 1)
            start, total = index + 1, 0
    if start < len(sizes):
        yield range(start, len(sizes))


def join_group(address: str, port: int, rank: int, world_size: int, timeout_seconds: int) -> Any:
    """A gloo group beside torch's default one, which neither Megatron nor vLLM ever sees."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    return stateless_init_torch_distributed_process_group(
        address, port, rank, world_size, "gloo", timeout=timedelta(seconds=timeout_seconds)
    )
