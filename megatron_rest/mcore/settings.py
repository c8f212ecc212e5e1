"""``megatron.{transformer,ddp,optimizer}``: the user's values over ours, checked against Megatron's own classes."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import typing
from collections.abc import Mapping
from typing import Any

import torch

from megatron_rest.config import ConfigError
from megatron_rest.pass_through import OURS

__all__ = ["make", "resolved"]


def make(cls: type, section: str, ours: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """An instance of Megatron's dataclass ``cls`` with ``ours`` and, over it, what ``megatron.{section}`` holds.

    Raises ConfigError for a field that this Megatron-Core has not (with the nearest), for a value of another kind, and
    with Megatron's own words for a combination that it refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    values = dict(ours)
    for name, value in given.items():
        key = f"megatron.{section}.{name}"
        if name not in fields:
            near = difflib.get_close_matches(name, fields - set(OURS[f"megatron.{section}"]), n=1)
            hint = f"did you mean {near[0]}?" if near else f"see {cls.__module__}.{cls.__name__}"
            raise ConfigError(f"{key}: this Megatron-Core's {cls.__name__} has no {name}: {hint}")
        values[name] = _convert(value, hints[name], key)
    if not given:
        return cls(**values)
    try:
        return cls(**values)
    except (ValueError, AssertionError, NotImplementedError, RuntimeError) as error:
        what = " ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"Megatron-Core's {cls.__name__} refuses megatron.{section} {what}: {' '.join(str(error).split())}"
        ) from error


def resolved(settings: Any) -> dict[str, Any]:
    """All fields of one of Megatron's dataclasses as plain values, for the record; code is left out."""
    values = {f.name: getattr(settings, f.name, None) for f in dataclasses.fields(settings)}
    return {
        name: _plain(value) for name, value in values.items() if not callable(value) or isinstance(value, enum.Enum)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple) and all(isinstance(one, str | bool | int | float) for one in value):
        return list(value)
    return str(value).removeprefix("torch.")


def _convert(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the field wants it: an enumeration's member and a data type by name, a whole number as a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in arguments:
            return value
    elif origin in (list, tuple):
        if isinstance(value, list):
            one = arguments[0] if arguments else Any
            return origin(_convert(item, one, key) for item in value)
    elif arguments and origin is not dict:
        for argument in arguments:
            try:
                return _convert(value, argument, key)
            except ConfigError:
                continue
    elif hint is type(None):
        if value is None:
            return None
    elif hint is Any:
        return value
    elif hint is torch.dtype:
        kind = getattr(torch, value, None) if isinstance(value, str) else None
        if isinstance(kind, torch.dtype):
            return kind
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        if isinstance(value, str) and value in hint.__members__:
            return hint[value]
        hint = " or ".join(hint.__members__)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    text = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ConfigError(f"{key} is {value!r} ({type(value).__name__}), and Megatron-Core takes {text}")
