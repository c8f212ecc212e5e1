"""Messages between a rank and its engine's process: JSON for what has names, raw bytes for arrays.  Nothing is pickled.

[4 bytes header length][8 bytes payload length][header: JSON {"kind", ..., "arrays": [[name, dtype, n], ...]}][payload]

What is no such message ends the connection: lengths are bounded before memory is taken, arrays have to fill the payload
exactly, and there is no way to find the next message behind a broken one.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Connection", "ConnectionLostError"]

_LENGTHS = struct.Struct("!IQ")
_DTYPES = ("int32", "int64", "float32", "bool")
_MAX_HEADER = 1 << 28
_MAX_PAYLOAD = 1 << 32  # a step of 4096 rollouts of 32768 tokens each holds three arrays of half a gigabyte


class ConnectionLostError(ConnectionError):
    """The other end is gone, or does not speak this protocol."""


class Connection:
    """Both ends of a stream socket.  Sending is thread-safe; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()

    def send(self, kind: str, arrays: Mapping[str, np.ndarray] | None = None, **values: Any) -> None:
        """Raises ConnectionLostError when nobody is there to read."""
        parts = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
        table = [[name, array.dtype.name, array.size] for name, array in parts.items()]
        header = json.dumps({"kind": kind, "arrays": table, **values}, default=_plain).encode()
        payload = b"".join(array.tobytes() for array in parts.values())
        with self._sending:
            try:
                self._socket.sendall(_LENGTHS.pack(len(header), len(payload)) + header + payload)
            except OSError as error:
                raise ConnectionLostError(str(error)) from error

    def receive(
        self, timeout: float | None = None, *, max_header: int = _MAX_HEADER, max_payload: int = _MAX_PAYLOAD
    ) -> dict[str, Any]:
        """The next message, its arrays under their names.

        Raises ConnectionLostError at the end of the stream or at something that is no message of at most ``max_header``
        and ``max_payload`` bytes, and TimeoutError when nothing comes within ``timeout`` seconds.
        """
        self._socket.settimeout(timeout)
        header_size, payload_size = _LENGTHS.unpack(self._read(_LENGTHS.size))
        if header_size > max_header or payload_size > max_payload:
            raise ConnectionLostError(f"no message of ours: it claims {header_size} + {payload_size} bytes")
        header = self._read(header_size)
        payload = memoryview(self._read(payload_size))
        try:
            return _parse(header, payload)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConnectionLostError(f"no message of ours: {type(error).__name__}: {error}") from error

    def has_message(self, seconds: float = 0.0) -> bool:
        """Whether a message, or the end of the stream, comes within ``seconds``."""
        try:
            readable = select.poll()  # select() refuses descriptors above 1023
            readable.register(self._socket, select.POLLIN | select.POLLHUP | select.POLLERR)
            return bool(readable.poll(1000 * seconds))
        except (OSError, ValueError) as error:  # closed here
            raise ConnectionLostError(str(error)) from error

    def close(self) -> None:
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while len(view):
            try:
                count = self._socket.recv_into(view)
            except TimeoutError:
                raise
            except OSError as error:
                raise ConnectionLostError(str(error)) from error
            if count == 0:
                raise ConnectionLostError("end of stream")
            view = view[count:]
        return buffer


def _parse(header: bytearray, payload: memoryview) -> dict[str, Any]:
    message = json.loads(header)
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ValueError("the header is no object with a kind")
    offset = 0
    for name, dtype, size in message.pop("arrays"):
        if dtype not in _DTYPES or not isinstance(name, str) or name in message:
            raise ValueError(f"array {name!r} of dtype {dtype!r}: expected a name of its own and one of {_DTYPES}")
        if type(size) is not int or size < 0:
            raise ValueError(f"array {name!r} has {size!r} elements")
        array = np.frombuffer(payload, dtype=dtype, count=size, offset=offset) if size else np.empty(0, dtype)
        offset += array.nbytes
        message[name] = array
    if offset != len(payload):
        raise ValueError(f"arrays fill {offset} bytes of {len(payload)}")
    return message


def _plain(value: object) -> Any:
    """A number of numpy's as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")
