"""NeMo-Run's experiment on this machine, with the jobs' output on the user's terminal as it comes.

What NeMo-Run 0.11.1 does with a local job, and what is done here instead:

* ``tail_logs=True`` prints whole lines behind ``name/0``, so a progress bar never shows.  Here a job gets a terminal if
  we have one (:mod:`launch.terminal`), its output arrives byte for byte and is kept in ``<log_dir>/<job>.log``.
* Ctrl-C raises in the main thread, which then waits in a thread pool for the job to end by itself; torchrun's workers,
  in sessions of their own, outlive it.  Here the whole process tree ends (:mod:`launch.processes`).
* A failed job does not stop the ones that depend on it.  Here it does, with exit status 1.

Only ``_wait_for_jobs`` is overridden: submission, order, packaging and status stay NeMo-Run's own.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.compat import ensure_nemo_run_importable
from launch.processes import Interrupted, raise_on_signals, stop_tree
from launch.terminal import FileOutput, Pty

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402
from torchx.specs.api import parse_app_handle  # noqa: E402

__all__ = ["LiveExperiment"]

_POLL_SECONDS = 0.05  # below what an eye notices, and 20 wake-ups a second cost nothing


class LiveExperiment(run.Experiment):
    """``on_event(job, "start" | "done" | "failed")`` is called around every job."""

    log_dir: Path | None = None
    on_event: Callable[[str, str], None] | None = None
    pty: Pty | None = None

    def _wait_for_jobs(self, jobs: list[Any]) -> None:
        for job in jobs:
            self._tell(job.id, "start")
            status = self._follow(job)
            self._tell(job.id, "failed" if status else "done")
            if status:
                raise SystemExit(1)

    def _tell(self, job: str, event: str) -> None:
        if self.on_event is not None:
            self.on_event(job, event)

    def _follow(self, job: Any) -> int:
        """Copy the job's output until it ends; its exit status."""
        replica = self._replica(job.handle)
        sources: list[Pty | FileOutput] = [
            FileOutput(replica.stdout.name, sys.stdout.buffer),
            FileOutput(replica.stderr.name, sys.stderr.buffer),
        ]
        outputs = [*([self.pty] if self.pty else []), *sources]
        log = open(self.log_dir / f"{job.id}.log", "ab") if self.log_dir else None  # noqa: SIM115  closed below

        def pump() -> None:
            for output in outputs:
                output.copy(log)

        def is_alive() -> bool:
            return replica.proc.poll() is None

        def wait() -> None:
            pump()
            time.sleep(_POLL_SECONDS)

        restore = raise_on_signals()
        try:
            while is_alive():
                wait()
        except Interrupted as interrupt:
            print(f"\nending {job.id} (once more: at once) ...", file=sys.stderr, flush=True)
            stop_tree(replica.proc.pid, is_alive=is_alive, meanwhile=wait)
            raise SystemExit(128 + interrupt.signum) from None
        finally:
            pump()
            restore()
            for source in sources:
                source.close()
            if log:
                log.close()
        return int(replica.proc.returncode)

    def _replica(self, handle: str) -> Any:
        """torchx's record of the job's one process."""
        scheduler, _, app_id = parse_app_handle(handle)
        app = self._runner._scheduler(scheduler)._apps[app_id]
        ((replica,),) = app.role_replicas.values()
        return replica
