"""The long run's judge can fail: what grows is named, and what a process leaks shows in what it says of its heap."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.long_run import Sample, Watch, growth, probe_environment, verdicts

STEPS = 200


def samples(**a_step: float) -> list[Sample]:
    """One process, one sample every second step, with so much more of each quantity a step."""
    start = {
        "rss_bytes": 500_000_000, "heap_bytes": 150_000_000, "python_blocks": 1_600_000,
        "num_fds": 100, "num_threads": 70, "num_shm": 0,
    }  # fmt: skip
    assert a_step.keys() <= start.keys()
    return [
        Sample("rank 0", 7, step, **{name: int(value + a_step.get(name, 0) * step) for name, value in start.items()})
        for step in range(0, STEPS + 1, 2)
    ]


def test_a_process_that_stays_as_it_is_has_no_verdict() -> None:
    assert verdicts(growth(samples(), STEPS)) == []
    assert verdicts(growth(samples(rss_bytes=40_000, heap_bytes=3_000, python_blocks=30), STEPS)) == []


@pytest.mark.parametrize(
    ("name", "a_step", "words"),
    [
        ("rss_bytes", 60_000, "rank 0: rss bytes grow by 60000 a step, limit 50000"),
        ("heap_bytes", 5_000, "rank 0: heap bytes grow by 5000 a step, limit 4000"),
        ("python_blocks", 50, "rank 0: python blocks grow by 50 a step, limit 40"),
        ("num_fds", 0.2, "rank 0: +10.5 fds in the last quarter"),
        ("num_threads", 0.2, "rank 0: +10.5 threads in the last quarter"),
        ("num_shm", 0.2, "rank 0: +10.5 shm in the last quarter"),
    ],
)
def test_what_grows_is_named(name: str, a_step: float, words: str) -> None:
    assert verdicts(growth(samples(**{name: a_step}), STEPS)) == [words]


@pytest.mark.extended
def test_a_leak_shows_in_what_the_process_says_of_its_heap(tmp_path: Path) -> None:
    """A real process and the real probe: C memory that is never freed, and Python objects that are kept."""
    script = """
import ctypes, time
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
kept = []
while True:
    libc.malloc(100_000)
    kept += [object() for _ in range(1_000)]
    time.sleep(0.1)
"""
    with subprocess.Popen([sys.executable, "-c", script], env=probe_environment(tmp_path)) as process:
        try:
            watch = Watch(psutil.Process(process.pid), tmp_path)
            deadline = time.monotonic() + 120
            heap: dict[int, int] = {}  # bytes -> blocks, of each report
            while len(heap) < 2 and time.monotonic() < deadline:
                time.sleep(0.5)
                watch.look(0)
                last = watch.samples[-1]
                if last.heap_bytes is not None and last.python_blocks is not None:
                    heap[last.heap_bytes] = last.python_blocks
        finally:
            process.kill()
    (first_bytes, first_blocks), (next_bytes, next_blocks) = sorted(heap.items())[:2]
    assert next_bytes - first_bytes >= 1_000_000, "five seconds hold about fifty of them; a busy machine fewer"
    assert next_blocks - first_blocks >= 10_000
