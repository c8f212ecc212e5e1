"""A Megatron checkpoint of a run as an HF folder, on one rank or on torchrun's:

python -m megatron_rest.commands.export --config RUN/run.yaml [checkpoint.load=RUN/checkpoints/step_000010]

Writes ``RUN/hf_step_000010``, from the newest complete checkpoint if none is named.  One rank holds the whole model;
torchrun's ranks share it as the configuration says.  Only the model is read: no optimiser, no engine.
"""

from __future__ import annotations

from megatron_rest.rollout.process import has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver())

import os  # noqa: E402
import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

from megatron_rest.config import ParallelConfig, RestConfig  # noqa: E402
from megatron_rest.trainer.entry import worker_main  # noqa: E402

__all__ = ["export_checkpoint", "main"]


def export_checkpoint(config: RestConfig) -> None:
    """Load, gather, write.  Collective over all ranks."""
    from megatron_rest.mcore import checkpoint
    from megatron_rest.trainer.console import Console
    from megatron_rest.trainer.export import export_hf
    from megatron_rest.trainer.setup import build_bare_policy, set_threads, weight_source

    run_dir = Path(config.trainer.run_dir)
    path = checkpoint.named_or_latest(config)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        config = _on_one_rank(config)
    set_threads(config)
    parts = build_bare_policy(config)
    checkpoint.load_model(path, parts.policy)
    source = weight_source(parts, bucket_bytes=config.weight_sync.bucket_bytes)
    output = export_hf(
        iter(source),
        base=config.model.path,
        output=run_dir / f"hf_{path.name}",
        chat_template=config.model.chat_template,
    )
    Console(enabled=parts.context.rank == 0).line(f"wrote {output}")


def _on_one_rank(config: RestConfig) -> RestConfig:
    """The whole model here, and no engines beside it."""
    return replace(
        config,
        parallel=ParallelConfig(distributed_optimizer=config.parallel.distributed_optimizer),
        rollout=replace(config.rollout, replicas=0, nodes=0, max_staleness=0, tensor_parallel=1),
        weight_sync=replace(config.weight_sync, transport="local"),
    )


def main(argv: list[str] | None = None) -> int:
    """Parse, export; returns the exit status."""
    return worker_main(export_checkpoint, __doc__, argv, keeps_folder=False)


if __name__ == "__main__":
    sys.exit(main())
