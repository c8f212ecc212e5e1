"""From ``rollout.environment`` to what multi-turn rollouts need."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

from megatron_rest.config import ConfigError, RolloutConfig
from megatron_rest.hf_folder import load_tokenizer
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.engine import Exam
from megatron_rest.rollout.environments.base import EnvironmentFactory
from megatron_rest.rollout.environments.bfcl import bfcl_environment
from megatron_rest.rollout.rollouter import Conversation
from megatron_rest.rollout.translator import ChatTranslator

__all__ = ["exam_conversation", "find_environment", "make_conversation"]

_KNOWN: dict[str, EnvironmentFactory] = {"bfcl": bfcl_environment}


def make_conversation(
    config: RolloutConfig, model_path: str | Path, chat: ChatSettings | None = None
) -> Conversation | None:
    """None without an environment.  The tokenizer is that of ``model_path``; certify it before (``certify.py``)."""
    if not config.environment:
        return None
    chat = chat or ChatSettings()
    ends = chat.stop_token_ids(model_path)
    return Conversation(
        factory=find_environment(config.environment),
        translator=ChatTranslator(load_tokenizer(model_path), chat=chat, stop_token_ids=ends),
        max_turns=config.max_turns,
        timeout_seconds=config.tool_timeout_seconds,
    )


def exam_conversation(
    exam: Exam, config: RolloutConfig, model_path: str | Path, chat: ChatSettings | None = None
) -> Conversation | None:
    """What an exam needs in the place of ``rollout.environment``; time limits are those of ``config``."""
    return make_conversation(replace(config, environment=exam.environment, max_turns=exam.max_turns), model_path, chat)


def find_environment(name: str) -> EnvironmentFactory:
    """A known environment, or ``package.module:factory``.  Raises ConfigError for what is neither."""
    if name in _KNOWN:
        return _KNOWN[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"rollout.environment is {name!r}: known are {', '.join(_KNOWN)}, your own is package.module:factory"
        )
    try:
        factory: EnvironmentFactory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rollout.environment {name!r} cannot be imported: {error}") from error
    return factory
