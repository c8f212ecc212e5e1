"""A run's checkpoint again in the form that loads at any layout, on the ranks and the layout that saved it:

torchrun ... -m megatron_rest.commands.reshard --config RUN/run.yaml [checkpoint.load=RUN/checkpoints/step_000010]

Checkpoints of a run that goes on hold the distributed optimiser's state as it lies (``checkpoint.any_layout``).  Writes
``RUN/any_layout/step_000010``, from the newest complete checkpoint if none is named; ``checkpoint.load=`` that in a run
of another layout.  Any number of replicas will do; host memory for 12 to 30 bytes a parameter of a rank is wanted.
"""

from __future__ import annotations

from megatron_rest.rollout.process import has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver())

import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

from megatron_rest.config import RestConfig  # noqa: E402
from megatron_rest.trainer.entry import worker_main  # noqa: E402

__all__ = ["main", "reshard"]


def reshard(config: RestConfig) -> None:
    """Load, write.  Collective over all ranks."""
    from megatron_rest.mcore import checkpoint, rng
    from megatron_rest.trainer.console import Console
    from megatron_rest.trainer.setup import build_policy, set_threads

    run_dir = Path(config.trainer.run_dir)
    path = checkpoint.named_or_latest(config)
    set_threads(config)
    updates = config.trainer.steps * config.optimizer.updates_per_step
    parts = build_policy(config, optimizer=config.optimizer, num_updates=updates)
    loaded = checkpoint.load(path, parts.policy)
    if loaded.rng is not None:
        rng.restore(loaded.rng)
    # All that are there are kept: nothing but this one is ours to remove.
    keeping = replace(config.checkpoint, asynchronous=False, keep_last=sys.maxsize)
    writer = checkpoint.CheckpointWriter(run_dir / "any_layout", keeping)
    output = writer.save(parts.policy, step=loaded.step, extra=loaded.extra, form=checkpoint.ANY_LAYOUT)
    writer.wait()
    Console(enabled=parts.context.rank == 0).line(f"wrote {output}")


def main(argv: list[str] | None = None) -> int:
    """Parse, load, write; returns the exit status."""
    return worker_main(reshard, __doc__, argv, keeps_folder=False)


if __name__ == "__main__":
    sys.exit(main())
