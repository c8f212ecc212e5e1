"""Benchmarks inside training: the live engines answer greedily, and what they answer is scored and kept.

    RUN/validation/version_000010/<benchmark>/answers.jsonl, verdicts.jsonl, summary.json

Folders are those of ``megatron-rest eval score``, so ``megatron-rest eval compare`` takes two of them.  Each appears
whole or not at all; a step that is done again after a restart writes its own again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rest.config import ConfigError, RestConfig
from megatron_rest.data.prompt_files import read_manifest
from megatron_rest.eval.answers import ANSWERS_FILE, AnswerLog, read_answers
from megatron_rest.eval.asking import Interviewer, choose
from megatron_rest.eval.cases import EvalCase
from megatron_rest.eval.decontamination import decontamination_of
from megatron_rest.eval.scoring import judge, write_scores
from megatron_rest.eval.selection import find_categories, load_cases
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.trainer.fleet import EngineFleet
from megatron_rest.types import RolloutGroup, StopReason

__all__ = ["VALIDATION_DIR", "Validator", "validation_line"]

VALIDATION_DIR = "validation"
_PREFIX = "validation/"


class Validator:
    """Cases drawn once, asked again and again.

    Args:
        config: the whole configuration; ``validation`` says what and how often.
        tokenizer: of the policy.
        rank: rank 0 scores and writes.
        chat: template and dialect of the run.

    The same on every rank.  Raises ConfigError for categories that do not exist, whose package is missing, that the
    engines cannot serve, or none of whose prompts fits the context.
    """

    def __init__(self, config: RestConfig, tokenizer: Any, *, rank: int, chat: ChatSettings | None = None) -> None:
        section = config.validation
        self._every, self._last = section.every, config.trainer.steps
        self._folder = Path(config.trainer.run_dir) / VALIDATION_DIR
        self._rank = rank
        self._interviewer = Interviewer(
            tokenizer,
            prompt_style=section.prompt_style or _style_of(config.data.train),
            max_model_len=config.model.max_sequence_length,
            max_response_tokens=section.max_response_tokens or config.rollout.max_response_tokens,
            chat=chat,
        )
        self._cases: dict[str, list[EvalCase]] = {}
        self._left_out: dict[str, list[str]] = {}
        try:
            chosen = find_categories([name for name in section.categories.replace(",", " ").split() if name])
            for benchmark, categories in chosen.items():
                cases = load_cases(benchmark, categories)
                self._cases[benchmark], too_long = choose(self._interviewer, cases, section.cases, seed=section.seed)
                self._left_out[benchmark] = [case.case_id for case in too_long]
            self._exams = self._interviewer.exams([case for part in self._cases.values() for case in part])
        except (ValueError, ModuleNotFoundError) as error:
            raise ConfigError(f"validation.categories: {error}") from error
        is_shared = config.rollout.tensor_parallel > 1 and not config.rollout.replicas
        if is_shared and any(part.exam.environment for part in self._exams):
            raise ConfigError(
                "validation.categories holds conversations, which colocated engines of rollout.tensor_parallel > 1 "
                "cannot have (tools answer at different times on their ranks): leave multi_turn_* out, or set "
                "rollout.replicas"
            )
        self._data = [decontamination_of(name) for name in (config.data.train, config.warm_start.answers) if name]

    def is_due(self, version: int) -> bool:
        """Whether the policy of this version is validated: before training, every so many steps, and the last."""
        return version % self._every == 0 or version == self._last

    def __call__(self, fleet: EngineFleet, *, version: int, refresh: Callable[[], object]) -> dict[str, float]:
        """Ask the engines, which hold ``version``; the metrics on rank 0, nothing on others.  Collective."""
        started = time.monotonic()
        groups: dict[str, RolloutGroup] = {}
        for part in self._exams:
            answered = fleet.examine(
                part.prompts, part.exam, max_response_tokens=part.max_response_tokens, refresh=refresh
            )
            groups |= {case.case_id: group for case, group in zip(part.cases, answered, strict=True)}
        if self._rank != 0:
            return {}
        return self._score(groups, version=version, seconds=time.monotonic() - started)

    def _score(self, groups: Mapping[str, RolloutGroup], *, version: int, seconds: float) -> dict[str, float]:
        folder = self._folder / f"version_{version:06d}"
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        metrics: dict[str, float] = {}
        for benchmark, cases in self._cases.items():
            (partial / benchmark).mkdir(parents=True)
            with AnswerLog(partial / benchmark / ANSWERS_FILE) as log:
                for case in cases:
                    [rollout] = groups[case.case_id].rollouts
                    log.add(case.case_id, self._interviewer.answer(case, rollout), stop_reason=str(rollout.stop_reason))
            verdicts = judge(cases, read_answers(log.path))
            more = {"policy_version": version, "seconds": seconds, "left_out": self._left_out[benchmark]}
            summary = write_scores(partial / benchmark, benchmark, verdicts, **more, decontamination=self._data)
            metrics |= _metrics(benchmark, summary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        rollouts = [group.rollouts[0] for group in groups.values()]
        metrics[f"{_PREFIX}truncated"] = sum(r.stop_reason is not StopReason.EOS for r in rollouts) / len(rollouts)
        return metrics


def validation_line(metrics: Mapping[str, float], *, version: int) -> str:
    """``validation, policy version 10: api-bank 12.5 %, bfcl 3.1 %`` from a step's metrics; empty if there was none."""
    found = {}
    for name, value in metrics.items():
        parts = name.removeprefix(_PREFIX).split("/")
        if name.startswith(_PREFIX) and parts[1:] == ["accuracy"]:
            found[parts[0]] = f"{parts[0]} {value:.1%}"
    return f"validation, policy version {version}: {', '.join(found.values())}" if found else ""


def _metrics(benchmark: str, summary: Mapping[str, Any]) -> dict[str, float]:
    values = {}
    for name, part in {"": summary["all"], **summary["categories"]}.items():
        where = f"{_PREFIX}{benchmark}/{name}/" if name else f"{_PREFIX}{benchmark}/"
        values[f"{where}accuracy"] = part["accuracy"]["estimate"]
        if part["soft_accuracy"]:
            values[f"{where}soft_accuracy"] = part["soft_accuracy"]["estimate"]
    return values


def _style_of(data: str) -> str:
    return str(read_manifest(Path(data)).get("options", {}).get("prompt_style") or "original")
