"""Traces of some steps (``profile.steps``): one file a rank, phases named as in the metrics.

    RUN_DIR/profile/steps_3-5_rank_0.json.gz        for chrome://tracing, Perfetto, TensorBoard's profiler plugin

Where Nsight Systems looks (nsys sets ``NSYS_PROFILING_SESSION_ID``) steps and phases are NVTX ranges in every step, and
the steps of ``profile.steps`` are the capture range of ``nsys profile --capture-range=cudaProfilerApi``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_rest.config import ProfileConfig

__all__ = ["PROFILE_DIR", "Profiler"]

PROFILE_DIR = "profile"
_NSYS = "NSYS_PROFILING_SESSION_ID"

_log = logging.getLogger(__name__)


class Profiler:
    """Profiles this rank.

    Args:
        config: which steps, and what is recorded.
        run_dir: where traces go.
        rank: of this process.
    """

    def __init__(self, config: ProfileConfig, *, run_dir: str | Path, rank: int) -> None:
        self._config = config
        self._first, self._last = config.first_and_last
        name = f"steps_{self._first}-{self._last}_rank_{rank}.json.gz"
        self.path = Path(run_dir) / PROFILE_DIR / name
        self._running: torch.profiler.profile | None = None
        self._has_gpu = torch.cuda.is_available()
        self._is_seen_by_nsys = self._has_gpu and _NSYS in os.environ

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a whole step; the trace is written behind the last one, or behind one that raises."""
        if step == self._first:
            self._start()
        try:
            with self._range(f"step {step}"):
                yield
        except BaseException:
            self._stop()
            raise
        if step == self._last:
            self._stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a phase of a step."""
        with self._range(name):
            yield

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        if self._is_seen_by_nsys:
            torch.cuda.nvtx.range_push(name)
        try:
            if self._running is None:
                yield
            else:
                with torch.profiler.record_function(name):
                    yield
        finally:
            if self._is_seen_by_nsys:
                torch.cuda.nvtx.range_pop()

    def _start(self) -> None:
        if self._is_seen_by_nsys:
            torch.cuda.profiler.start()
            return  # two profilers cannot have the GPU's counters at once
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self._has_gpu else []
        self._running = torch.profiler.profile(
            activities=activities,
            record_shapes=self._config.shapes,
            with_stack=self._config.stacks,
            profile_memory=self._config.memory,
        )
        self._running.start()

    def _stop(self) -> None:
        if self._is_seen_by_nsys:
            torch.cuda.profiler.stop()
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        partial = self.path.with_name(f".partial_{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(partial))
            partial.replace(self.path)
        except (OSError, RuntimeError) as error:  # a trace is worth no run
            _log.warning("%s could not be written: %s", self.path, error)
