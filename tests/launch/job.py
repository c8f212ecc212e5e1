"""Jobs for the tests of local stages; started as ``python -m tests.launch.job``, also on torchrun's ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    kind, *rest = sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    if kind == "say":
        print(f"rank {rank} of {os.environ.get('WORLD_SIZE', '1')} tty={sys.stdout.isatty()}", flush=True)
        sys.stdout.write("10 %\r")
        sys.stdout.write("100 %\r\n" if sys.stdout.isatty() else "100 %\n")
        print("to stderr", file=sys.stderr)
    elif kind == "fail":
        if rank == rest[0]:
            raise ValueError(f"no luck on rank {rank}")
        time.sleep(120)
    elif kind == "sleep":
        # a rank that ignores SIGTERM and has a child of its own: the worst that has to be ended
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (Path(rest[0]) / f"pids-{rank}").write_text(f"{os.getpid()} {child.pid}")
        print(f"rank {rank} sleeps", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
