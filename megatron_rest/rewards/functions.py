"""Rewards of one's own: what a reward function is given, and what it may say.

    def brevity(answer: RewardInput, *, target: int = 40) -> float:
        return -abs(len(answer.text.split()) - target) / target

    reward.function: package.module:brevity      reward.arguments: {target: 20}

It returns a number, or a :class:`Reward` (or a mapping with a Reward's names) that also says what single turns, calls
or tokens earned, numbers to be logged, an accuracy, whether the format is valid, and findings for people.  Everything
here is JSON at heart, since functions may run in another process or behind an address.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

__all__ = ["Reward", "RewardInput", "RewardTurn", "checked_reward"]

_MAX_PARTS = 64
_MAX_FINDINGS = 32
_MAX_FINDING = 500  # characters
_PART_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTurn:
    """One turn of the policy."""

    text: str
    """Without its end-of-turn marker; what the prompt has written of it (an opened thought) stands first."""
    calls: tuple[Mapping[str, Any], ...] = ()
    """``{"name", "arguments"}`` in order, as the run's dialect reads them."""
    call_errors: tuple[str, ...] = ()
    """What looked like a call and is none."""
    observation: str = ""
    """What the environment said next, as the policy saw it; empty behind the last turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardInput:
    """One rollout and the row that it answers."""

    prompt_id: str
    messages: tuple[Mapping[str, Any], ...] = ()
    """The prompt before the chat template: ``{"role", "content"}``."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """``{"name", "description", "parameters"}``."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the row that are part of neither prompt nor reference."""
    reference: str = ""
    """The reference answer in ToolRL's tags."""
    text: str = ""
    """The last turn's text."""
    turns: tuple[RewardTurn, ...] = ()
    tokens: tuple[str, ...] = ()
    """Text of every token that the policy sampled, over all turns; half characters are replaced."""
    step: int = 0
    """RL step, from 1."""
    stop_reason: str = ""
    """As ``stop/...`` in the metrics."""
    environment_reward: float | None = None
    """What the environment gave; None without one, or if it left the judging to others."""

    @property
    def num_calls(self) -> int:
        """Calls of all turns."""
        return sum(len(turn.calls) for turn in self.turns)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RewardInput:
        """Undo :meth:`to_json`."""
        turns = tuple(
            RewardTurn(**{**turn, "calls": tuple(turn["calls"]), "call_errors": tuple(turn["call_errors"])})
            for turn in values["turns"]
        )
        tuples = {name: tuple(values[name]) for name in ("messages", "tools", "tokens")}
        return cls(**{**values, **tuples, "turns": turns})


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """What a reward function may say.  The reward is ``value`` plus all of ``turns``, ``calls`` and ``tokens``."""

    value: float = 0.0
    """Of the answer as a whole."""
    turns: tuple[float, ...] = ()
    """One number for each turn (it is put on the turn's last token), or none."""
    calls: tuple[float, ...] = ()
    """One for each call of all turns (on the call's last token), or none."""
    tokens: tuple[float, ...] = ()
    """One for each of ``RewardInput.tokens``, or none."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Numbers to be logged as ``reward/NAME/PART``; they are not added to anything."""
    accuracy: float | None = None
    """In [0, 1], if it has one."""
    is_format_valid: bool | None = None
    """If it looks at the format."""
    findings: tuple[str, ...] = ()
    """What was wrong, for people."""

    @property
    def total(self) -> float:
        return math.fsum([self.value, *self.turns, *self.calls, *self.tokens])

    @property
    def is_fine_grained(self) -> bool:
        return bool(self.turns or self.calls or self.tokens)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


_REWARD_NAMES = tuple(f.name for f in fields(Reward))


def checked_reward(said: Any, answer: RewardInput) -> Reward:
    """What a foreign function or server said, as a Reward.  Raises TypeError or ValueError that says what is wrong."""
    if isinstance(said, Mapping):
        unknown = [str(name) for name in said if name not in _REWARD_NAMES]
        if unknown:
            raise ValueError(f"a reward has no {unknown[0]!r}: it has {', '.join(_REWARD_NAMES)}")
        said = Reward(**said)
    if not isinstance(said, Reward):
        return Reward(value=_number(said, "the reward"))
    calls = answer.num_calls
    accuracy = None if said.accuracy is None else _number(said.accuracy, "accuracy")
    if accuracy is not None and not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"accuracy is {accuracy}, expected a number in [0, 1]")
    if said.is_format_valid is not None and not isinstance(said.is_format_valid, bool | np.bool_):
        raise TypeError(f"is_format_valid is {said.is_format_valid!r}, expected true, false or nothing")
    return Reward(
        value=_number(said.value, "value"),
        turns=_numbers(said.turns, "turns", len(answer.turns)),
        calls=_numbers(said.calls, "calls", calls),
        tokens=_numbers(said.tokens, "tokens", len(answer.tokens)),
        parts=_parts(said.parts),
        accuracy=accuracy,
        is_format_valid=None if said.is_format_valid is None else bool(said.is_format_valid),
        findings=_findings(said.findings),
    )


def _number(value: Any, what: str) -> float:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # scalars of numpy and torch
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise TypeError(f"{what} is {_shown(value)}, expected a finite number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}, expected a finite number")
    return number


def _numbers(values: Any, what: str, count: int) -> tuple[float, ...]:
    if values is None or (isinstance(values, Sequence) and len(values) == 0):
        return ()
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"{what} is {_shown(values)}, expected {count} numbers or none")
    if len(values) != count:
        raise ValueError(f"{what} has {len(values)} numbers, and the answer has {count} {what}")
    return tuple(_number(value, f"{what}[{i}]") for i, value in enumerate(values))


def _parts(values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping) or len(values) > _MAX_PARTS:
        raise TypeError(f"parts is {_shown(values)}, expected at most {_MAX_PARTS} numbers by name")
    for name in values:
        if not isinstance(name, str) or not _PART_NAME.fullmatch(name):
            raise ValueError(f"parts holds the name {_shown(name)}: letters, digits, '_', '.' and '-' only")
    return {name: _number(value, f"parts.{name}") for name, value in values.items()}


def _findings(values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"findings is {_shown(values)}, expected a list of texts")
    return tuple(value[:_MAX_FINDING].encode(errors="replace").decode() for value in values[:_MAX_FINDINGS])


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return repr(value)[:40]
    return repr(value[:40]) if isinstance(value, str | bytes) else f"of type {type(value).__name__}"
