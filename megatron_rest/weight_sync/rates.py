"""What the simulations assume of hosts and links.  Data sheets, or measured on a CPU host where that is said."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RATES", "Rates"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Bytes a second and seconds."""

    nic: float = 50e9  # of one GPU's 400 Gbit/s card, each way
    message: float = 20e-6  # before the first byte of a message moves (assumed)
    send: float = 117e-6  # of the sender's host a message: slice, digest, bookkeeping (measured on one core)
    receive: float = 88e-6  # of the worker's host (measured likewise)
    copy: float = 7.5e-6  # more of either for every copy that is packed or scattered (measured likewise)


RATES = Rates()
