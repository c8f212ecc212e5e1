"""First on PYTHONPATH, every Python process below says what its heap holds.  For ``benchmarks.long_run``.

Resident memory also moves with holes in the heap, caches, and pages touched for the first time; what the allocator has
handed out and not got back does not.  A file named after the process, in the folder ``HEAP_PROBE_FOLDER``, holds the
least values of the last five seconds (a step comes and goes in them): bytes by glibc (``mallinfo2``, arenas and mapped
blocks) and number of Python's own small blocks.
"""

import ctypes
import os
import sys
import threading
import time

_PERIOD_SECONDS = 5.0
_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def _report(folder: str) -> None:
    mallinfo2 = ctypes.CDLL(None).mallinfo2  # glibc 2.33; AttributeError ends this thread, and there is no file
    mallinfo2.restype = _MallInfo2
    pid = os.getpid()
    path = os.path.join(folder, str(pid))
    while True:
        live, blocks = sys.maxsize, sys.maxsize
        end = time.monotonic() + _PERIOD_SECONDS
        while time.monotonic() < end:
            info = mallinfo2()
            live = min(live, info.uordblks + info.hblkhd)
            blocks = min(blocks, sys.getallocatedblocks())
            time.sleep(0.05)
        with open(f"{path}.new", "w") as file:
            file.write(f"{live} {blocks}")
        os.replace(f"{path}.new", path)


if folder := os.environ.get("HEAP_PROBE_FOLDER"):
    threading.Thread(target=_report, args=(folder,), daemon=True, name="heap probe").start()
