"""Transport ``broadcast``: packed buckets of whole tensors to all workers of an engine in processes of its own.

What most systems do: simple, needs to know nothing of how the engine cuts its weights, and moves everything to
everybody.  The transport by slices (sliced.py) moves what is needed; this one stands beside it in the benchmark.

The sender and every worker form one process group beside torch's default one.  Names, dtypes and shapes travel once,
with vLLM's own RPC; both ends cut the stream into the same buckets from them, so no bucket needs a header.  The next
bucket is gathered and packed while the workers load the one before it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_rest.network import listen, own_address
from megatron_rest.weight_sync.links import join_group, meet, new_token
from megatron_rest.weight_sync.transport import machine_of

if TYPE_CHECKING:
    from megatron_rest.weight_sync.source import TensorMeta
    from megatron_rest.weight_sync.transport import SyncTarget

__all__ = ["BroadcastSender", "bucket_ranges", "num_bytes"]

_TIMEOUT_SECONDS = 600
_SENDER = 0  # rank of the sender in the transfer's group; workers follow


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


class BroadcastSender:
    """The trainer's end; one rank of TP x PP holds it.

    Args:
        bucket_bytes: tensors are packed until a bucket reaches this size.
        timeout_seconds: how long either end waits for the other.
    """

    def __init__(self, *, bucket_bytes: int, timeout_seconds: int = _TIMEOUT_SECONDS) -> None:
        self._bucket_bytes = bucket_bytes
        self._timeout_seconds = timeout_seconds
        self._group: Any = None

    def connect(self, engine: SyncTarget) -> None:
        """Rendezvous with the engine's workers; both ends join the group at the same time."""
        is_here = machine_of(engine) == socket.gethostname()
        address = "127.0.0.1" if is_here else own_address(several_machines=True)
        listener = listen(address)
        port, world_size, token = listener.getsockname()[1], 1 + engine.num_workers, new_token()
        info = {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": world_size,
            "bucket_bytes": self._bucket_bytes,
            "timeout_seconds": self._timeout_seconds,
            "token": token,
        }
        place = (address, port, _SENDER, world_size, self._timeout_seconds)
        self._group, _ = meet(
            [
                lambda given_up: join_group(*place, token=token, given_up=given_up, listener=listener),
                lambda _: engine.init_weight_transfer(info),
            ]
        )

    def send(self, engine: SyncTarget, stream: Iterator[tuple[str, Tensor]], metadata: list[TensorMeta]) -> None:
        """Broadcast the stream; the engine loads each bucket as it comes.  Raises what the engine raised.

        Raises ValueError when the stream is not what ``metadata`` says: the receivers cut by the metadata.
        """
        info = {
            "names": [m.name for m in metadata],
            "dtype_names": [str(m.dtype).removeprefix("torch.") for m in metadata],
            "shapes": [list(m.shape) for m in metadata],
        }
        executor = ThreadPoolExecutor(1)
        try:
            loaded = executor.submit(engine.update_weights, info)
            self._broadcast(stream, metadata, loaded)
            loaded.result()
        finally:
            executor.shutdown(wait=False)

    def close(self) -> None:
        self._group = None

    def _broadcast(
        self, stream: Iterator[tuple[str, Tensor]], metadata: list[TensorMeta], loaded: Future[None]
    ) -> None:
        sizes = [m.num_bytes for m in metadata]
        for indices in bucket_ranges(sizes, self._bucket_bytes):
            parts = [_bytes_of(next(stream), metadata[i]) for i in indices]
            if loaded.done():
                loaded.result()  # a worker that has failed already would never answer the broadcast
            self._group.broadcast(torch.cat(parts).cpu(), _SENDER).wait()


def _bytes_of(item: tuple[str, Tensor], expected: TensorMeta) -> Tensor:
    name, tensor = item
    if (name, tensor.dtype, tuple(tensor.shape)) != (expected.name, expected.dtype, expected.shape):
        raise ValueError(f"the source yields {name} {tensor.dtype} {tuple(tensor.shape)}, but announced {expected}")
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
