"""Messages between a rank and its engine's process: JSON for what has names, raw bytes for arrays.  Nothing is pickled.

[4 bytes header length][8 bytes payload length][header: JSON {"kind", ..., "arrays": [[name, dtype, n], ...]}][payload]
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Connection", "ConnectionLostError"]

_LENGTHS = struct.Struct("!IQ")
_DTYPES = ("int32", "int64", "float32", "bool")


class ConnectionLostError(ConnectionError):
    """The other end is gone."""


class Connection:
    """Both ends of a stream socket.  Sending is thread-safe; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()

    def send(self, kind: str, arrays: Mapping[str, np.ndarray] | None = None, **values: Any) -> None:
        """Raises ConnectionLostError when nobody is there to read."""
        parts = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
        table = [[name, array.dtype.name, array.size] for name, array in parts.items()]
        header = json.dumps({"kind": kind, "arrays": table, **values}).encode()
        payload = b"".join(array.tobytes() for array in parts.values())
        with self._sending:
            try:
                self._socket.sendall(_LENGTHS.pack(len(header), len(payload)) + header + payload)
            except OSError as error:
                raise ConnectionLostError(str(error)) from error

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message, its arrays under their names.

        Raises ConnectionLostError at the end of the stream and TimeoutError when nothing comes within ``timeout``
        seconds.
        """
        self._socket.settimeout(timeout)
        header_size, payload_size = _LENGTHS.unpack(self._read(_LENGTHS.size))
        message: dict[str, Any] = json.loads(self._read(header_size))
        payload = memoryview(self._read(payload_size))
        offset = 0
        for name, dtype, size in message.pop("arrays"):
            if dtype not in _DTYPES:
                raise ValueError(f"array {name} has dtype {dtype!r}, expected one of {_DTYPES}")
            array = np.frombuffer(payload, dtype=dtype, count=size, offset=offset)
            offset += array.nbytes
            message[name] = array
        return message

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
