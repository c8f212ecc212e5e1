"""Train with ResT until ``trainer.steps``; a run folder with checkpoints is continued from the newest complete one.

    megatron-rest train CONFIG [section.key=value ...]                           one rank, this process
    torchrun --nproc-per-node N -m megatron_rest.trainer --config CONFIG ...     N ranks

Rank 0 prints what is accelerated, one line a step (reward, loss, seconds) and at the end a summary with the files of
the run: metrics.jsonl, checkpoints, hf.  Status 0: finished; 75: stopped by SIGTERM and saved; 2: something in the
configuration or on this machine is wrong; 1: the run failed.
"""

from __future__ import annotations

from megatron_rest.rollout.process import has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver())  # environment that torch and vLLM read when they are imported

import sys  # noqa: E402

from megatron_rest.trainer.entry import worker_main  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Parse, train, report; returns the exit status."""
    from megatron_rest.trainer.run import train

    return worker_main(train, __doc__, argv, prog="megatron-rest train")


if __name__ == "__main__":
    sys.exit(main())
