"""Tool calls of a policy, carried out on Python objects: public methods, literal arguments, nothing else.

The text is hostile.  It is parsed, never evaluated: a call is one name and arguments that are JSON-like literals of
bounded size; the name must be a public method that the class of one of the objects defines.  Attributes, operators,
comprehensions, f-strings, starred arguments, nested calls and everything with an underscore in front are refused before
anything runs.

What runs is bounded, too: results are cut to ``MAX_RESULT`` characters, and objects that calls let grow by more than
``MAX_GROWTH`` bytes (copies of copies) take no further call.  Time is the caller's to limit
(``rollout.tool_timeout_seconds``): Python cannot end a thread, so a method that never returns keeps its thread.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CallRefusedError", "LiteralCall", "LiteralExecutor", "parse_call", "show_result"]

MAX_TEXT = 1 << 16  # characters of one call
MAX_NODES = 10_000  # values in its arguments
MAX_DEPTH = 16
MAX_INTEGER = 2**53  # beyond it JSON is not exact either
MAX_RESULT = 1 << 20  # characters of a result
MAX_GROWTH = 8 << 20  # bytes, roughly, that the objects may gain

_VALUE_BYTES = 128  # of a small Python object


class CallRefusedError(ValueError):
    """The call is not one that may be carried out; the message is fit for the policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiteralCall:
    """A method's name and literal arguments."""

    name: str
    positional: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)


def parse_call(text: str) -> LiteralCall:
    """``name(1, key="value")`` or ``Object.name(...)`` as data.  Raises CallRefusedError for anything else."""
    if len(text) > MAX_TEXT:
        raise CallRefusedError(f"a call of {len(text)} characters, more than {MAX_TEXT}")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CallRefusedError(f"not a call: {type(error).__name__}") from None
    if not isinstance(node, ast.Call):
        raise CallRefusedError("not a single call")
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        name = node.func.attr
    elif isinstance(node.func, ast.Name):
        name = node.func.id
    else:
        raise CallRefusedError("what is called must be a plain name")
    if any(keyword.arg is None for keyword in node.keywords):
        raise CallRefusedError("** arguments are not literals")
    names = [str(keyword.arg) for keyword in node.keywords]
    if len(set(names)) != len(names):
        raise CallRefusedError("an argument is given twice")
    values = [_literal(value, 0) for value in [*node.args, *(keyword.value for keyword in node.keywords)]]
    positional = tuple(values[: len(node.args)])
    return LiteralCall(
        name=name, positional=positional, keywords=dict(zip(names, values[len(node.args) :], strict=True))
    )


class LiteralExecutor:
    """Calls public methods of ``objects`` by name.

    Args:
        objects: anything; of two that have a method of the same name the later one is called, as in BFCL.
        largest: by method, a parameter and the largest number it may be, where a small literal means unbounded work.
    """

    def __init__(self, objects: Mapping[str, object], *, largest: Mapping[str, tuple[str, int]] | None = None) -> None:
        self._objects = list(objects.values())
        self._limit = _size(self._objects, math.inf) + MAX_GROWTH
        self._largest = largest or {}
        self._methods: dict[str, Callable[..., Any]] = {}
        for target in objects.values():
            for name, _ in inspect.getmembers(type(target), inspect.isfunction):
                if not name.startswith("_"):
                    self._methods[name] = getattr(target, name)

    @property
    def names(self) -> list[str]:
        """What may be called."""
        return sorted(self._methods)

    def call(self, call: LiteralCall) -> Any:
        """The method's own result.

        Raises CallRefusedError for an unknown name, arguments that the method does not take, that are not literals or
        too large, and for every call once the objects have grown too large; what the method raises passes through.
        """
        if self._limit < 0:
            raise CallRefusedError(f"the objects have grown by more than {MAX_GROWTH >> 20} MB: no further calls")
        method = self._methods.get(call.name)
        if method is None:
            raise CallRefusedError(f"there is no tool named {call.name[:80]!r}")
        count = 0
        for value in [*call.positional, *call.keywords.values()]:
            count += _check(value, 0)
        if count > MAX_NODES:
            raise CallRefusedError(f"arguments of {count} values, more than {MAX_NODES}")
        try:
            bound = inspect.signature(method).bind(*call.positional, **call.keywords)
        except TypeError as error:
            raise CallRefusedError(f"{call.name}: {error}") from None
        if call.name in self._largest:
            _check_size(*self._largest[call.name], bound.arguments)
        try:
            return method(*call.positional, **call.keywords)
        finally:  # one call can at most double what is there
            if _size(self._objects, self._limit) > self._limit:
                self._limit = -1

    def run(self, call: LiteralCall | str) -> str:
        """The result as text for the policy; a refusal or an exception of the tool is told in the text."""
        try:
            text = show_result(self.call(parse_call(call) if isinstance(call, str) else call))
        except Exception as error:  # noqa: BLE001  tools are foreign code, and their failures are part of the game
            text = f"Error during execution: {error}"
        return text[:MAX_RESULT]


def _check_size(parameter: str, largest: int, arguments: Mapping[str, Any]) -> None:
    """A text is refused, too: some libraries read numbers out of it."""
    value = arguments.get(parameter)
    if isinstance(value, str) or (isinstance(value, int | float) and abs(value) > largest):
        raise CallRefusedError(f"{parameter} is a number and may be at most {largest}")


def show_result(value: Any) -> str:
    """Text of a tool's result, as BFCL shows it."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        try:
            return json.dumps(value)
        except (TypeError, ValueError):  # a number of a type of its own inside
            return str(value)
    return str(value)


def _size(values: list[Any], limit: float) -> float:
    """Bytes of what ``values`` hold, roughly; at least ``limit`` if it is more.  Iterative: nesting may be deep."""
    total, seen = 0, set()
    stack = list(values)
    while stack and total <= limit:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        total += _VALUE_BYTES
        match value:
            case str() | bytes() | bytearray():
                total += len(value)
            case dict():
                stack += [*value.keys(), *value.values()]
            case list() | tuple() | set() | frozenset():
                stack += value
            case int() if not isinstance(value, bool):
                total += value.bit_length() // 8
            case _ if hasattr(value, "__dict__"):
                stack += vars(value).values()
    return total


def _literal(node: ast.expr, depth: int) -> Any:
    """Value of a literal expression."""
    if depth > MAX_DEPTH:
        raise CallRefusedError(f"arguments nested deeper than {MAX_DEPTH}")
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as value)) if (
            not isinstance(value, bool)
        ):
            return -value if isinstance(node.op, ast.USub) else value
        case ast.List(elts=items):
            return [_literal(item, depth + 1) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_literal(item, depth + 1) for item in items)
        case ast.Dict(keys=keys, values=values):
            if any(not (isinstance(key, ast.Constant) and isinstance(key.value, str)) for key in keys):
                raise CallRefusedError("keys of an object are strings")
            return {key.value: _literal(v, depth + 1) for key, v in zip(keys, values, strict=True)}  # type: ignore[union-attr]
    raise CallRefusedError(f"arguments are literals, not {type(node).__name__}")


def _check(value: Any, depth: int) -> int:
    """Number of values in an argument; CallRefusedError for what is no JSON-like literal of bounded size."""
    if depth > MAX_DEPTH:
        raise CallRefusedError(f"arguments nested deeper than {MAX_DEPTH}")
    match value:
        case None | bool():
            return 1
        case int() if abs(value) <= MAX_INTEGER:
            return 1
        case float() if math.isfinite(value):
            return 1
        case str() if len(value) <= MAX_TEXT:
            return 1
        case list() | tuple():
            return 1 + sum(_check(item, depth + 1) for item in value)
        case dict() if all(isinstance(key, str) for key in value):
            return 1 + sum(_check(item, depth + 1) for item in value.values())
    raise CallRefusedError(f"an argument of type {type(value).__name__} is out of bounds")
