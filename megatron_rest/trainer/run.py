"""A whole RL run: build, loop, checkpoint, export, summary."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rest.analysis.report import PLOTS_DIR
from megatron_rest.analysis.series import load_runs
from megatron_rest.code_version import running_code
from megatron_rest.config import ConfigError, Fp8Recipe, RestConfig, to_dict
from megatron_rest.data.sample_file import read_sample_rows, sample_path
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
from megatron_rest.trainer.trackers import TrackedRun, Trackers, check_loggers
from megatron_rest.trainer.trainer import RestTrainer
from megatron_rest.trainer.validation import Validator, validation_line
from megatron_rest.trainer.watch import Watch
from megatron_rest.types import StepReport
from megatron_rest.user_code import load_named, named_code, recorded
from megatron_rest.weight_sync.sync import WeightSync
from megatron_rest.weighting import find_credit

__all__ = ["build_trainer", "train"]

_log = logging.getLogger(__name__)
_SHOWN_SAMPLES = 16  # of a step, to trackers
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
    loggers = {entry.name for entry in config.trainer.as_loggers()}
    writer = MetricsWriter(run_dir, tensorboard="tensorboard" in loggers) if context.rank == 0 else None
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
            user_code=recorded(config),
            resolved=_resolved(trainer),
        )
    trackers = _trackers(config, after_step=start) if context.rank == 0 else None
    if start == 0 and not trainer.is_ahead:  # there the first step validates it
        _validate(trainer, 0, console)
    total = config.trainer.steps - start
    with (
        StopRequest(context.device) as stop,
        console.progress("ResT", total=total, unit="step", plain_interval=_PROGRESS_SECONDS) as progress,
    ):
        for step in range(start + 1, config.trainer.steps + 1):
            report = trainer.step(step)
            is_stopping = stop.is_agreed() and step < config.trainer.steps
            is_saved = is_stopping or _is_due(step, config)
            if writer is not None and is_saved:
                writer.write(report)  # before the checkpoint: a run that continues from it has every step before
            report = _with_seconds(
                report, _leave_step(trainer, report, is_saved=is_saved, is_last=is_stopping), trackers
            )
            if writer is not None:
                (writer.amend if is_saved else writer.write)(report)
            console.step(report)
            if trackers is not None:
                trackers.log(report)
                _show_samples(trackers, run_dir, step)
            if text := validation_line(report.metrics, version=report.policy_version):
                console.line(text)
            progress.update()
            if is_stopping:
                _end_trackers(trackers, console, is_finished=False)
                raise StoppedEarly(
                    f"asked to stop: step {step} of {config.trainer.steps} is saved; the same command continues"
                )
    if trainer.is_ahead and start < config.trainer.steps and trainer.validator is not None:
        trainer.sync_weights(version=config.trainer.steps)  # no step has sent the last one's weights
        _validate(trainer, config.trainer.steps, console)
    trainer.on_phase(config.trainer.steps, "export")
    _finish(trainer, config, console, writer)
    _show_plots(trackers, run_dir)
    _end_trackers(trackers, console, is_finished=True)


def _leave_step(trainer: RestTrainer, report: StepReport, *, is_saved: bool, is_last: bool) -> Mapping[str, float]:
    """The checkpoint of a step, if one is due, and those that are written in the background; seconds by phase."""
    step = report.step
    with trainer.timer(step) as timer:
        if is_saved:
            trainer.save(step, report.metrics, timer, is_last=is_last)
        with timer.phase("checkpoint"):
            trainer.checkpoints.poll()
        if is_last or step == trainer.config.trainer.steps:
            with timer.phase("wait"):
                trainer.checkpoints.wait()
                trainer.rollout_files.wait()
    return timer.seconds


def _with_seconds(report: StepReport, more: Mapping[str, float], trackers: Trackers | None) -> StepReport:
    """The step with what came behind it: its checkpoint, and waits."""
    seconds = {name: report.seconds.get(name, 0.0) + value for name, value in more.items()}
    metrics = dict(report.metrics)
    if trackers is not None and trackers.num_failures:
        metrics["tracker/failures"] = float(trackers.num_failures)
    return replace(report, seconds={**report.seconds, **seconds}, metrics=metrics)


def _resolved(trainer: RestTrainer) -> dict[str, Any]:
    """What vLLM and Megatron-Core were made with, on this rank, and which code was named; plain values."""
    return {
        "user_code": recorded(trainer.config),
        "engine_args": trainer.fleet.engine_arguments(),
        "megatron": trainer.parts.policy.settings(),
    }


def build_trainer(config: RestConfig) -> RestTrainer:
    """Every part of a run, connected.  Collective over all ranks; prints nothing."""
    check_engine_args(config.rollout.engine_args)
    check_loggers(config.trainer)
    for named in named_code(config):  # before anything large is built
        load_named(named)
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


def _trackers(config: RestConfig, *, after_step: int) -> Trackers:
    run_dir = Path(config.trainer.run_dir)
    told = {**to_dict(config), "code": running_code(), "user_code": recorded(config)}
    run = TrackedRun(name=run_dir.name, run_dir=run_dir.absolute(), config=told, after_step=after_step)
    return Trackers(config.trainer, run)


_TABLE = ("prompt", "reference", "answer", "reward", "advantage", "findings")
_CELL = 2000  # characters


def _show_samples(trackers: Trackers, run_dir: Path, step: int) -> None:
    path = sample_path(run_dir, step)
    if not trackers.is_empty and path.is_file():
        rows = read_sample_rows(path)[:_SHOWN_SAMPLES]
        for row in rows:
            row |= {"reward": row["reward"]["total"], "findings": "; ".join(row["findings"])}
        cells = [[v[-_CELL:] if isinstance(v := row[name], str) else v for name in _TABLE] for row in rows]
        trackers.table(step, "samples", _TABLE, cells)


def _end_trackers(trackers: Trackers | None, console: Console, *, is_finished: bool) -> None:
    """Collective: no rank leaves before all is told, since launchers end the others then."""
    if trackers is not None:
        for text in trackers.close(is_finished=is_finished):
            console.line(f"WARNING: {text}")
    dist.barrier()


def _show_plots(trackers: Trackers | None, run_dir: Path) -> None:
    if trackers is None or trackers.is_empty:
        return
    try:
        from megatron_rest.analysis.plots import plot_runs

        for path in plot_runs(load_runs([run_dir]), run_dir / PLOTS_DIR):
            trackers.picture(path)
    except (ImportError, OSError, ValueError) as error:  # the run has ended well without them
        _log.warning("no plots for the loggers: %s", error)


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
