"""From ``rollout.environment`` to what multi-turn rollouts need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rest.config import ConfigError, RolloutConfig
from megatron_rest.hf_folder import load_tokenizer
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.engine import Exam
from megatron_rest.rollout.environments.base import EnvironmentFactory
from megatron_rest.rollout.environments.bfcl import bfcl_environment
from megatron_rest.rollout.rollouter import Conversation
from megatron_rest.rollout.translator import ChatTranslator
from megatron_rest.user_code import NamedCode, load_named

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
        factory=find_environment(config.environment, config.environment_arguments),
        translator=ChatTranslator(load_tokenizer(model_path), chat=chat, stop_token_ids=ends),
        max_turns=config.max_turns,
        timeout_seconds=config.tool_timeout_seconds,
    )


def exam_conversation(
    exam: Exam, config: RolloutConfig, model_path: str | Path, chat: ChatSettings | None = None
) -> Conversation | None:
    """What an exam needs in the place of ``rollout.environment``; time limits are those of ``config``."""
    asked = replace(config, environment=exam.environment, environment_arguments={}, max_turns=exam.max_turns)
    return make_conversation(asked, model_path, chat)


def find_environment(name: str, arguments: Mapping[str, Any] | None = None) -> EnvironmentFactory:
    """A known environment, or ``package.module:factory``, which is called with the prompt and ``arguments``.

    Raises ConfigError for what is neither, and for a factory that cannot be called so.
    """
    if name in _KNOWN:
        return _KNOWN[name]
    if ":" not in name:
        raise ConfigError(
            f"rollout.environment is {name!r}: known are {', '.join(_KNOWN)}, your own is package.module:factory"
        )
    arguments = dict(arguments or {})
    factory: EnvironmentFactory = load_named(
        NamedCode(key="rollout.environment", reference=name, called_with=("prompt",), arguments=arguments)
    )
    return partial(factory, **arguments) if arguments else factory
