"""Give a job the user's terminal: progress bars that move, colours, the real width.

NeMo-Run's local executor connects a job's output to files, so programs print for files.  With a terminal on our side,
the job is started through this module, ``python -m launch.terminal /dev/pts/N command...``, which reconnects its output
to a pseudo-terminal that :class:`Pty` copies to the screen and, without the redrawn lines, to a log.
"""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from typing import BinaryIO

__all__ = ["FileOutput", "Pty"]

_REDRAWN = re.compile(rb"[^\n]*\r(?!\r*\n)|\r(?=\r*\n)|\x1b\[[0-9;]*[A-Za-z]")
"""What a progress bar overwrote, the terminal's carriage returns, and colours: noise in a log."""


class Pty:
    """A pseudo-terminal of the size of ours; :meth:`copy` moves what was written to it."""

    def __init__(self) -> None:
        self._master, self._slave = pty.openpty()  # our copy of the slave stays open: no EIO between two writers
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        os.set_blocking(self._master, False)
        self.name = os.ttyname(self._slave)

    def copy(self, log: BinaryIO | None = None) -> None:
        """Everything there is to the screen, and cleaned to ``log``."""
        while chunk := self._read():
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            if log is not None:
                log.write(_REDRAWN.sub(b"", chunk))
                log.flush()

    def close(self) -> None:
        os.close(self._master)
        os.close(self._slave)

    def _read(self) -> bytes:
        try:
            return os.read(self._master, 1 << 16)
        except BlockingIOError:
            return b""


class FileOutput:
    """The same for an output file of the job: all it writes without a terminal, errors before it has one otherwise."""

    def __init__(self, path: str | Path, stream: BinaryIO) -> None:
        self._source = open(path, "rb")  # noqa: SIM115  open as long as the job runs
        self._stream = stream

    def copy(self, log: BinaryIO | None = None) -> None:
        if chunk := self._source.read():
            for sink in (self._stream, log):
                if sink is not None:
                    sink.write(chunk)
                    sink.flush()

    def close(self) -> None:
        self._source.close()


def main() -> None:
    """``python -m launch.terminal DEVICE COMMAND...``: become COMMAND with its output on DEVICE."""
    device, *command = sys.argv[1:]
    descriptor = os.open(device, os.O_WRONLY | os.O_NOCTTY)  # NOCTTY: Ctrl-C is the launcher's to handle
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
