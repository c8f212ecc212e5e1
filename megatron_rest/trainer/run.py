"""A whole RL run: build, loop, checkpoint, export, summary."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rest.config import ConfigError, Fp8Recipe, RestConfig
from megatron_rest.hf_folder import load_tokenizer
from megatron_rest.mcore import accelerations, checkpoint
from megatron_rest.mcore.build import ParallelContext
from megatron_rest.mcore.reference import ReferencePolicy
from megatron_rest.regions import token_bytes_table
from megatron_rest.rollout.certify import CertificationError, certify
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.conversations import make_conversation
from megatron_rest.rollout.engine_args import check_engine_args
from megatron_rest.rollout.host import EngineHost
from megatron_rest.rollout.keeper import sweep
from megatron_rest.rollout.remote import RemoteEngine
from megatron_rest.rollout.vllm_engine import VllmEngine
from megatron_rest.run_folder import finish, is_finished
from megatron_rest.trainer.console import Console
from megatron_rest.trainer.engine_nodes import find_hosts, hosted_place
from megatron_rest.trainer.entry import StoppedEarly
from megatron_rest.trainer.export import export_hf
from megatron_rest.trainer.fleet import EngineFleet, Placement, engine_devices
from megatron_rest.trainer.judge import Judge
from megatron_rest.trainer.metrics import MetricsWriter, PhaseTimer
from megatron_rest.trainer.setup import (
    build_policy,
    chat_lines,
    chat_settings,
    judged_dialect,
    open_prompts,
    peak_memory_bytes,
    set_threads,
    turn_ends,
    weight_source,
)
from megatron_rest.trainer.starts import record_start
from megatron_rest.trainer.stopping import StopRequest
from megatron_rest.trainer.trainer import RestTrainer
from megatron_rest.trainer.validation import Validator, validation_line
from megatron_rest.trainer.watch import Watch
from megatron_rest.user_code import package_digests
from megatron_rest.weight_sync.sync import WeightSync
from megatron_rest.weighting import find_credit

__all__ = ["build_trainer", "train"]

_PROGRESS_SECONDS = 60.0  # between two progress lines in a log file: the step lines say enough in between


def train(config: RestConfig) -> None:
    """Train until ``trainer.steps``.

    Continue from the newest complete checkpoint of the run directory if there is one; a run that is finished is left
    alone.  SIGTERM ends it after the step that is running, saved: raises :class:`StoppedEarly` on every rank.
    """
    run_dir = Path(config.trainer.run_dir)
    if is_finished(config):
        Console(enabled=os.environ.get("RANK", "0") == "0").line(
            f"{run_dir} holds this run, finished after {config.trainer.steps} steps: nothing to do"
        )
        return
    set_threads(config)
    trainer = build_trainer(config)
    context = trainer.context
    limit = 60.0 * config.trainer.timeout_minutes
    with Watch(rank=context.rank, world_size=context.world_size, limit_seconds=limit) as watch:
        trainer.on_phase = watch.enter
        _train(trainer, run_dir)


def _train(trainer: RestTrainer, run_dir: Path) -> None:
    config, context = trainer.config, trainer.context
    console = Console(enabled=context.rank == 0)
    writer = MetricsWriter(run_dir) if context.rank == 0 else None
    console.line(str(accelerations.active()))
    for text in chat_lines(config):
        console.line(text)
    trainer.checkpoints.check_writable()
    trainer.settle_precision()  # the first weight transfer scores already
    start = _resume(trainer, run_dir, console)
    _certify(trainer, console)
    if writer is not None:
        writer.resume(start)
        record_start(
            run_dir,
            after_step=start,
            world_size=context.world_size,
            user_code=package_digests(config),
            resolved=_resolved(trainer),
        )
    if start == 0 and not trainer.is_one_step_off:  # one step off, the first step validates it
        _validate(trainer, 0, console)
    total = config.trainer.steps - start
    with (
        StopRequest(context.device) as stop,
        console.progress("ResT", total=total, unit="step", plain_interval=_PROGRESS_SECONDS) as progress,
    ):
        saving: dict[str, float] = {}  # seconds of the checkpoint before this step: its own line is written by then
        for step in range(start + 1, config.trainer.steps + 1):
            report = trainer.step(step)
            report = replace(report, seconds={**report.seconds, **saving})
            if writer is not None:
                writer.write(report)
            console.step(report)
            if text := validation_line(report.metrics, version=report.policy_version):
                console.line(text)
            trainer.on_phase(step, "checkpoint")
            started = time.perf_counter()
            is_stopping = stop.is_agreed() and step < config.trainer.steps
            is_saving = is_stopping or _is_due(step, config)
            if is_saving:
                trainer.save(step, report.metrics, is_last=is_stopping)
            trainer.checkpoints.poll()
            saving = {"checkpoint": time.perf_counter() - started} if is_saving else {}
            progress.update()
            if is_stopping:
                trainer.checkpoints.wait()
                raise StoppedEarly(
                    f"asked to stop: step {step} of {config.trainer.steps} is saved; the same command continues"
                )
    trainer.checkpoints.wait()
    trainer.rollout_files.wait()
    if trainer.is_one_step_off and start < config.trainer.steps and trainer.validator is not None:
        trainer.sync_weights(version=config.trainer.steps)  # no step has sent the last one's weights
        _validate(trainer, config.trainer.steps, console)
    trainer.on_phase(config.trainer.steps, "export")
    _finish(trainer, config, console, writer)


def _resolved(trainer: RestTrainer) -> dict[str, Any]:
    """What vLLM and Megatron-Core were made with, on this rank; plain values."""
    return {"engine_args": trainer.fleet.engine_arguments(), "megatron": trainer.parts.policy.settings()}


def build_trainer(config: RestConfig) -> RestTrainer:
    """Every part of a run, connected.  Collective over all ranks; prints nothing."""
    check_engine_args(config.rollout.engine_args)
    updates = config.trainer.steps * config.optimizer.updates_per_step
    parts = build_policy(config, optimizer=config.optimizer, num_updates=updates)
    prompts = open_prompts(config)
    if config.data.max_prompts:
        prompts = prompts.select(max_prompt_tokens=config.data.max_prompt_tokens, max_prompts=config.data.max_prompts)
    tokenizer = load_tokenizer(config.model.path)
    chat = chat_settings(config)
    ends = turn_ends(config, chat)
    try:
        certify(tokenizer, multi_turn=bool(config.rollout.environment), chat=chat, stop_token_ids=ends)
    except CertificationError as error:
        raise ConfigError(f"model.path: {error}") from error
    placement = Placement.of(config.rollout, parts.context.world_size)
    hosts = find_hosts(config, parts.context.rank)
    engine = make_engine(config, parts.context, placement, hosts, chat=chat, stop_token_ids=ends)
    source = weight_source(parts, bucket_bytes=config.weight_sync.bucket_bytes)
    fleet = EngineFleet(
        engine,
        placement=placement,
        rank=parts.context.rank,
        config=config.rollout,
        connect=lambda is_member: WeightSync(engine if is_member else None, source, config.weight_sync),
    )
    credit = find_credit(config.weighting)
    return RestTrainer(
        config,
        parts=parts,
        prompts=prompts,
        fleet=fleet,
        source=source,
        judge=Judge(
            token_bytes_table(tokenizer),
            reward=config.reward,
            advantage=config.advantage,
            dialect=judged_dialect(config, chat),
            stop_token_ids=ends,
            max_response_tokens=config.rollout.max_response_tokens,
            marks_turns="marks" in credit.traits.needs,
        ),
        weighting=credit,
        validator=Validator(config, tokenizer, rank=parts.context.rank, chat=chat) if config.validation.every else None,
        # Before any checkpoint is loaded: the reference is model.path, in a continued run as in the first.
        reference=ReferencePolicy(parts.policy) if config.loss.kl_coef else None,
    )


def make_engine(
    config: RestConfig,
    context: ParallelContext,
    placement: Placement,
    hosts: Sequence[EngineHost],
    *,
    chat: ChatSettings,
    stop_token_ids: Sequence[int],
) -> VllmEngine | RemoteEngine | None:
    """This rank's engine, in this process or in one of its own, on one of ``hosts`` if there are any; None if another
    rank has one for it."""
    index = placement.engine_of(context.rank)
    if index is None:
        return None
    path, rollout = config.model.path, config.rollout
    settings: dict[str, Any] = {
        "seed": config.trainer.seed,
        "max_model_len": config.model.max_sequence_length,
        "stop_token_ids": stop_token_ids,
        "chat": chat,
        "transport": config.weight_sync.transport,
    }
    if rollout.replicas:
        if hosts:
            host, devices = hosted_place(rollout, hosts, index)
            return RemoteEngine(path, rollout, devices=devices, host=host, **settings)
        return RemoteEngine(path, rollout, devices=engine_devices(context, rollout, placement, index), **settings)
    sweep()
    return VllmEngine(path, rollout, conversation=make_conversation(rollout, path, chat), **settings)


def _resume(trainer: RestTrainer, run_dir: Path, console: Console) -> int:
    """Continue this run if it has a checkpoint, else begin from ``checkpoint.load`` or from the model."""
    own, notes = checkpoint.newest_intact(run_dir / "checkpoints")
    for note in notes:
        console.line(f"WARNING: {note}; continuing from the one before it")
    path = own or trainer.config.checkpoint.load
    if not path:
        # The engine read its weights from the folder by itself: the first transfer makes them the trainer's own.
        trainer.sync_weights(version=0)
        return 0
    step, notes = trainer.resume(path, is_verified=own is not None)
    for note in notes:
        console.line(f"WARNING: {note}")
    console.line(f"continuing after step {step} from {path}")
    return step


def _validate(trainer: RestTrainer, version: int, console: Console) -> None:
    """Outside of a step: its numbers are in the folder, and no line of metrics.jsonl has them."""
    if text := validation_line(trainer.validate(version, PhaseTimer()), version=version):
        console.line(text)


def _certify(trainer: RestTrainer, console: Console) -> None:
    """Print what FP8 does to the log-probs; end the run if it is too much."""
    section = trainer.config.precision
    if section.recipe is Fp8Recipe.NONE:
        return
    certificate = trainer.certify_precision()
    for text in certificate.lines():
        console.line(text)
    certificate.check(section.max_mismatch)


def _is_due(step: int, config: RestConfig) -> bool:
    every = config.checkpoint.save_every
    return step == config.trainer.steps or bool(every and step % every == 0)


def _finish(trainer: RestTrainer, config: RestConfig, console: Console, writer: MetricsWriter | None) -> None:
    run_dir = Path(config.trainer.run_dir)
    files: dict[str, str | Path] = {"metrics": run_dir / "metrics.jsonl", "checkpoints": run_dir / "checkpoints"}
    if config.checkpoint.export_hf:
        files["hf model"] = export_hf(
            iter(trainer.source),
            base=config.model.path,
            output=run_dir / "hf",
            chat_template=config.model.chat_template,
        )
    peaks: list[int | None] = [None] * trainer.context.world_size
    dist.all_gather_object(peaks, peak_memory_bytes())
    if writer is not None:
        writer.close()
        finish(config, _resolved(trainer))
        console.summary(run_dir, peak_memory_bytes=sum(p or 0 for p in peaks), files=files)
    dist.barrier()
    trainer.fleet.close()
    os.sync()
