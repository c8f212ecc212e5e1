"""A whole RL run: build, loop, checkpoint, export, summary."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
import yaml

from megatron_rest.config import ConfigError, RestConfig, to_dict
from megatron_rest.mcore import checkpoint
from megatron_rest.regions import token_bytes_table
from megatron_rest.rollout.vllm_engine import VllmEngine
from megatron_rest.trainer.console import Console
from megatron_rest.trainer.export import export_hf
from megatron_rest.trainer.judge import Judge
from megatron_rest.trainer.metrics import MetricsWriter
from megatron_rest.trainer.setup import (
    build_policy,
    eos_token_id,
    load_tokenizer,
    open_prompts,
    peak_memory_bytes,
    set_threads,
    weight_source,
)
from megatron_rest.trainer.trainer import RestTrainer
from megatron_rest.weight_sync.sync import WeightSync
from megatron_rest.weighting import RestWeighting

__all__ = ["build_trainer", "train"]

_PROGRESS_SECONDS = 60.0  # between two progress lines in a log file: the step lines say enough in between


def train(config: RestConfig) -> None:
    """Train until ``trainer.steps``.

    Continue from the newest complete checkpoint of the run directory if there is one.
    """
    set_threads()
    trainer = build_trainer(config)
    context = trainer.context
    run_dir = Path(config.trainer.run_dir)
    console = Console(enabled=context.rank == 0)
    writer = MetricsWriter(run_dir) if context.rank == 0 else None
    start = _resume(trainer, run_dir, console)
    if writer is not None:
        writer.resume(start)
    total = config.trainer.steps - start
    with console.progress("ResT", total=total, unit="step", plain_interval=_PROGRESS_SECONDS) as progress:
        for step in range(start + 1, config.trainer.steps + 1):
            report = trainer.step(step)
            if writer is not None:
                writer.write(report)
            console.step(report)
            if _is_due(step, config):
                trainer.save(step)
            progress.update()
    _finish(trainer, config, console, writer)


def build_trainer(config: RestConfig) -> RestTrainer:
    """Every part of a run, connected.  Collective over all ranks; prints nothing."""
    if config.weight_sync.transport != "local":
        raise ConfigError(
            f"weight_sync.transport is {config.weight_sync.transport!r}: the trainer has an engine in every rank's "
            "process, which takes weights by reference (local)"
        )
    updates = config.trainer.steps * config.optimizer.updates_per_step
    parts = build_policy(config, optimizer=config.optimizer, num_updates=updates)
    prompts = open_prompts(config)
    if config.data.max_prompts:
        prompts = prompts.select(max_prompt_tokens=config.data.max_prompt_tokens, max_prompts=config.data.max_prompts)
    engine = VllmEngine(
        config.model.path,
        config.rollout,
        seed=config.trainer.seed,
        max_model_len=config.model.max_sequence_length,
        stop_token_ids=[eos_token_id(config.model.path)],
        transport=config.weight_sync.transport,
    )
    source = weight_source(parts, bucket_bytes=config.weight_sync.bucket_bytes)
    return RestTrainer(
        config,
        parts=parts,
        prompts=prompts,
        engine=engine,
        source=source,
        sync=WeightSync(engine, source, config.weight_sync),
        judge=Judge(
            token_bytes_table(load_tokenizer(config.model.path)), reward=config.reward, advantage=config.advantage
        ),
        weighting=RestWeighting.from_config(config.weighting),
    )


def _resume(trainer: RestTrainer, run_dir: Path, console: Console) -> int:
    path = trainer.config.checkpoint.load or checkpoint.latest(run_dir / "checkpoints")
    if not path:
        # The engine read its weights from the folder by itself: the first transfer makes them the trainer's own.
        trainer.sync_weights(version=0)
        return 0
    step = trainer.resume(path)
    console.line(f"continuing after step {step} from {path}")
    return step


def _is_due(step: int, config: RestConfig) -> bool:
    every = config.checkpoint.save_every
    return step == config.trainer.steps or bool(every and step % every == 0)


def _finish(trainer: RestTrainer, config: RestConfig, console: Console, writer: MetricsWriter | None) -> None:
    run_dir = Path(config.trainer.run_dir)
    files: dict[str, str | Path] = {"metrics": run_dir / "metrics.jsonl", "checkpoints": run_dir / "checkpoints"}
    if config.checkpoint.export_hf:
        files["hf model"] = export_hf(iter(trainer.source), base=config.model.path, output=run_dir / "hf")
    peaks: list[int | None] = [None] * trainer.context.world_size
    dist.all_gather_object(peaks, peak_memory_bytes())
    if writer is not None:
        writer.close()
        (run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        console.summary(run_dir, peak_memory_bytes=sum(p or 0 for p in peaks), files=files)
    dist.barrier()
    trainer.engine.close()
    os.sync()
