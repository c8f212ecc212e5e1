"""Bytes between two processes of a transfer group: sockets, or NCCL."""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GlooLink", "Link", "NcclLink", "Work", "free_port", "join_group", "new_token", "open_link"]

_TAG = 7


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> Any: ...


class Link(Protocol):
    """Point-to-point between the ranks of one transfer group; both calls return at once."""

    def send(self, data: Tensor, rank: int) -> Work: ...

    def receive(self, buffer: Tensor, rank: int) -> Work:
        """Fill ``buffer``, uint8 [num_bytes] in one piece on the engine's device; valid when the work is done."""
        ...


class GlooLink:
    """Sockets: for CPU, and for engines that share no GPU network with the trainer."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, data: Tensor, rank: int) -> Work:
        return self._group.send([data.cpu()], rank, _TAG)

    def receive(self, buffer: Tensor, rank: int) -> Work:
        if buffer.device.type == "cpu":
            return self._group.recv([buffer], rank, _TAG)
        staged = torch.empty_like(buffer, device="cpu")
        return _Staged(self._group.recv([staged], rank, _TAG), staged, buffer)


class _Staged:
    """A message on its way to a GPU through this machine's memory."""

    def __init__(self, work: Work, staged: Tensor, buffer: Tensor) -> None:
        self._work, self._staged, self._buffer = work, staged, buffer

    def wait(self) -> None:
        self._work.wait()
        self._buffer.copy_(self._staged)


class NcclLink:
    """NCCL between GPUs, on a stream of its own, through the communicator that vLLM brings.  Not measured."""

    def __init__(self, communicator: Any, device: torch.device) -> None:
        self._communicator, self._device = communicator, device
        self._stream = torch.cuda.Stream(device)

    def send(self, data: Tensor, rank: int) -> Work:
        data = data.to(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # it may still be packed
        self._communicator.send(data, rank, self._stream)
        data.record_stream(self._stream)
        return self._stream.record_event()

    def receive(self, buffer: Tensor, rank: int) -> Work:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the memory may still be read by others
        self._communicator.recv(buffer, rank, self._stream)
        buffer.record_stream(self._stream)
        return self._stream.record_event()


def open_link(
    backend: str,
    address: str,
    port: int,
    rank: int,
    world_size: int,
    timeout_seconds: int,
    device: torch.device,
    token: str = "",
) -> Link:
    """Join an engine's transfer group, ``gloo`` or ``nccl``; all its ranks call this together."""
    match backend:
        case "gloo":
            return GlooLink(join_group(address, port, rank, world_size, timeout_seconds, token=token))
        case "nccl":
            from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

            return NcclLink(stateless_init_process_group(address, port, rank, world_size, device), device)
    raise ValueError(f"no link {backend!r}: expected gloo or nccl")


def join_group(address: str, port: int, rank: int, world_size: int, timeout_seconds: int, *, token: str = "") -> Any:
    """A gloo group beside torch's default one, which neither Megatron nor vLLM ever sees.

    Rank 0 listens, on ``address`` alone (left to itself PyTorch's store listens on every address of the machine).
    Only who knows ``token`` finds the others there: it is made anew for every group (:func:`new_token`).
    """
    timeout = timedelta(seconds=timeout_seconds)
    options: dict[str, Any] = {"is_master": rank == 0, "timeout": timeout}
    if rank == 0:
        options["master_listen_fd"] = socket.create_server((address, port)).detach()  # the store closes it
    store = dist.TCPStore(address, port, world_size, **options)
    return dist.ProcessGroupGloo(dist.PrefixStore(f"weight_sync/{token}", store), rank, world_size, timeout=timeout)


def new_token() -> str:
    """A name for a group that nobody can guess."""
    return secrets.token_hex(16)


def free_port(address: str) -> int:
    """A TCP port that nobody uses on ``address`` at this moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
