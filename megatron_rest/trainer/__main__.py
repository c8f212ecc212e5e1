"""Worker entry: ``torchrun ... -m megatron_rest.trainer --config run.yaml [section.key=value ...]``.

Trains with ResT until ``trainer.steps``.  A run directory that already holds a checkpoint is continued from the newest
complete one.
"""

from __future__ import annotations

from megatron_rest.rollout.process import has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver())  # environment that torch and vLLM read when they are imported

import sys  # noqa: E402

from megatron_rest.trainer.entry import worker_main  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Parse, train, report; returns the exit status."""
    from megatron_rest.trainer.run import train

    return worker_main(train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
