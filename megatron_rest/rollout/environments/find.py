"""From the name of an environment to what makes one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_rest.config import ConfigError
from megatron_rest.rollout.environments.base import EnvironmentFactory
from megatron_rest.rollout.environments.bfcl import bfcl_environment
from megatron_rest.user_code import NamedCode, load_named

__all__ = ["find_environment"]

_KNOWN: dict[str, EnvironmentFactory] = {"bfcl": bfcl_environment}


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
