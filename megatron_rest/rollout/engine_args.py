"""``rollout.engine_args``: what goes to vLLM as it is, checked against vLLM's own argument class."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Mapping
from typing import Any

from megatron_rest.config import ConfigError
from megatron_rest.pass_through import OURS

__all__ = ["check_engine_args"]


def check_engine_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` if vLLM has all of these arguments, of these kinds.  Raises ConfigError naming the first that it has
    not, with the nearest that it has."""
    if not given:
        return {}
    from vllm.engine.arg_utils import EngineArgs

    fields = {f.name for f in dataclasses.fields(EngineArgs)}
    for name, value in given.items():
        key = f"rollout.engine_args.{name}"
        if name not in fields:
            near = difflib.get_close_matches(name, fields - set(OURS["rollout.engine_args"]), n=1)
            hint = f"did you mean {near[0]}?" if near else "see vllm serve --help"
            raise ConfigError(f"{key}: this vLLM has no argument {name}: {hint}")
        hint = _hint(EngineArgs, name)
        if not _fits(value, hint):
            raise ConfigError(f"{key} is {value!r} ({type(value).__name__}), and vLLM takes {_text(hint)}")
    return dict(given)


def _hint(arguments: type, name: str) -> Any:
    """Type of one field; Any where vLLM's module does not know it by itself (some are imported for type checkers)."""
    one = type("_One", (), {"__annotations__": {name: arguments.__annotations__[name]}})
    try:
        return typing.get_type_hints(one, vars(sys.modules[arguments.__module__]))[name]
    except NameError:
        return Any


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may be of the type ``hint``; a class of vLLM's own takes a mapping, and says what it
    thinks of it when the engine starts."""
    if hint is Any or value is None:
        return hint is Any or type(None) in typing.get_args(hint) or hint is type(None)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _fits(value, arguments[0])
    if origin is typing.Literal:
        return value in arguments
    if arguments and origin not in (list, dict, tuple, set, type):
        return any(_fits(value, argument) for argument in arguments)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind in (list, tuple, set):
        return isinstance(value, list)
    return isinstance(value, dict | str) if kind is not dict else isinstance(value, dict)


def _text(hint: Any) -> str:
    return str(hint).replace("typing.", "") if not isinstance(hint, type) else hint.__name__
