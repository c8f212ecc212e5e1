"""From ``rollout.environment`` to what multi-turn rollouts need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_rest.config import RolloutConfig
from megatron_rest.hf_folder import load_tokenizer
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.engine import Exam
from megatron_rest.rollout.environments.base import EnvironmentFactory
from megatron_rest.rollout.environments.find import find_environment
from megatron_rest.rollout.environments.guest import see_off
from megatron_rest.rollout.environments.workers import EnvironmentWorkers
from megatron_rest.rollout.rollouter import Conversation
from megatron_rest.rollout.translator import ChatTranslator

_CLOSE_SECONDS = 10.0  # for environments whose close() is under way at the end

__all__ = ["exam_conversation", "find_environment", "make_conversation"]


def make_conversation(
    config: RolloutConfig, model_path: str | Path, chat: ChatSettings | None = None
) -> Conversation | None:
    """None without an environment.  The tokenizer is that of ``model_path``; certify it before (``certify.py``)."""
    if not config.environment:
        return None
    chat = chat or ChatSettings()
    ends = chat.stop_token_ids(model_path)
    factory = _factory(config)
    return Conversation(
        factory=factory,
        translator=ChatTranslator(load_tokenizer(model_path), chat=chat, stop_token_ids=ends),
        max_turns=config.max_turns,
        timeout_seconds=config.tool_timeout_seconds,
        close=lambda: _close(factory),
    )


def _close(factory: EnvironmentFactory) -> None:
    see_off(_CLOSE_SECONDS)
    if isinstance(factory, EnvironmentWorkers):
        factory.close()


def _factory(config: RolloutConfig) -> EnvironmentFactory:
    if config.environment_workers:
        return EnvironmentWorkers(
            config.environment, config.environment_arguments, num_workers=config.environment_workers
        )
    return find_environment(config.environment, config.environment_arguments)


def exam_conversation(
    exam: Exam, config: RolloutConfig, model_path: str | Path, chat: ChatSettings | None = None
) -> Conversation | None:
    """What an exam needs in the place of ``rollout.environment``; time limits are those of ``config``."""
    asked = replace(config, environment=exam.environment, environment_arguments={}, max_turns=exam.max_turns)
    return make_conversation(asked, model_path, chat)
