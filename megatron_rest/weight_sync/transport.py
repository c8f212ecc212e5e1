"""What a transfer needs from an engine, and what every way of transferring offers the one who verifies it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

__all__ = ["EngineUnreachableError", "Outcome", "SyncTarget", "Tamper", "Transport", "machine_of"]

Tamper = Callable[[str, Tensor], Tensor]
"""Fault injection of the tests: changes a tensor between its digest and its hand-over."""


class SyncTarget(Protocol):
    """What an engine offers a transfer: vLLM's four weight-transfer calls, two checks, and what it is made of."""

    policy_version: int

    @property
    def num_workers(self) -> int: ...

    def weight_layout(self) -> list[dict[str, Any]]: ...

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self) -> None: ...

    def received_weights(self) -> list[dict[str, Any]]: ...

    def reset_prefix_cache(self) -> bool: ...


class EngineUnreachableError(ConnectionError):
    """Training ranks and one engine could not be connected; the same on every rank.

    Attributes:
        engines: which one it was, by its position among those that take part.
    """

    def __init__(self, message: str, engines: Sequence[int]) -> None:
        super().__init__(message)
        self.engines = tuple(engines)


def machine_of(engine: SyncTarget | None) -> str:
    """Name of the machine where an engine runs (``RemoteEngine.machine``); this one's for none."""
    return str(getattr(engine, "machine", socket.gethostname()))


@dataclass(kw_only=True, slots=True)
class Outcome:
    """One attempt to give the engines the present weights, as this rank saw it."""

    wrong: list[str] = field(default_factory=list)  # tensors that did not arrive as sent
    error: Exception | None = None  # what broke on this rank: its engine is half loaded, or gone
    non_finite: list[str] = field(default_factory=list)  # matrices with NaN or infinity, which FP8 cannot hold
    lost_peers: dict[int, str] = field(default_factory=dict)
    """Engines whose link to this rank broke, by their position among those that take part, and how."""
    num_bytes: int = 0
    num_tensors: int = 0
    checksum: str = ""
    gather_seconds: float = 0.0
    transfer_seconds: float = 0.0

    @property
    def is_broken(self) -> bool:
        """Whether sending again cannot help."""
        return self.error is not None or bool(self.lost_peers or self.non_finite)


class Transport(Protocol):
    """A way from training ranks into engines.  Both methods are collective over the ranks of the source."""

    def connect(self, engine: SyncTarget | None) -> None:
        """Once, before the first attempt; again only by making a new transport.  Raises on every rank or on none."""
        ...

    def attempt(self, engine: SyncTarget | None, *, detailed: bool, tamper: Tamper | None) -> Outcome:
        """Send everything once.  Does not raise: ranks must agree first.  ``detailed`` asks for a digest of everything
        that has a name, where a coarser one is enough to find out that something is wrong."""
        ...

    def close(self) -> None:
        """Give up what connects this rank to the engines; nobody waits for anybody."""
        ...
