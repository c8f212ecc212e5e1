"""Where a set keeps its parts: what a layout of the table and a ``--mapping`` file both are."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools.conversation import ROLES, MessageForm
from data_tools.errors import DataError, RowError
from data_tools.values import parsed

Row = dict[str, Any]
Paths = tuple[str, ...]
TOOL_PATHS: Paths = (
    *("tools", "functions", "function", "available_tools", "tools_json", "tool_definitions", "tool_schemas"),
    *("metadata.tools", "metadata.functions", "info.oai_tools", "info.tools", "extra_info.tools", "extra.tools"),
)
"""Where tools are looked for unless a mapping says; the first that is there and not empty."""
FIRST_STEPS = frozenset({*TOOL_PATHS, *(path.partition(".")[0] for path in TOOL_PATHS)})
REFERENCES = ("last", "each", "last-call")
_CHOICES = {
    "empty_calls": ("no-call", "refuse"),
    "nulls": ("auto", "keep", "drop"),
    "text_with_calls": ("drop", "keep"),
}
_STEP = re.compile(r"[^.\[\]]+|\[\d+\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Every place is a column or a path (``meta.answer``, ``metadata.tools[0]``), which goes through JSON text, or a
    list of such of which the first that is there counts.  A place that a row lacks is empty."""

    system: Paths = ("system",)
    """System message."""
    user: Paths = ()
    """User message."""
    input: Paths = ()
    """Text that belongs behind the user message."""
    history: Paths = ("history",)
    """Earlier turns, as pairs of texts or as messages."""
    messages: Paths = ()
    """List of messages, instead of user; without a reference of its own, ``reference`` says which is the reference."""
    tools: Paths = TOOL_PATHS
    """List of tools."""
    answer: Paths = ()
    """Reference answer as text, in ToolRL's tags or with calls in another dialect."""
    calls: Paths = ()
    """Reference calls."""
    response: Paths = ()
    """Reference text for the user."""
    think: Paths = ()
    """Reference thought."""
    reference: str = "last"
    """last, each (a row for every turn of the assistant), last-call, or the place of a message, messages or calls."""
    message: dict[str, str] = field(default_factory=dict, hash=False)
    """Keys of a message: ``{role: from, content: value}``."""
    roles: dict[str, str] = field(default_factory=dict, hash=False)
    """The set's roles: ``{human: user, machine: assistant, run: call, seen: tool}``."""
    calls_in_text: str = "auto"
    """auto, none, or the one dialect that texts may make calls in."""
    empty_calls: str = "no-call"
    """What an empty list of reference calls means: no-call (to call nothing is right), or refuse."""
    nulls: str = "auto"
    """Arguments that are null: auto (kept where the tool requires or allows them), keep, drop."""
    text_with_calls: str = "drop"
    """What a reference says beside its calls: drop, or keep (answers must then have both)."""

    @property
    def form(self) -> MessageForm:
        """How messages are spelled."""
        return MessageForm(keys=self.message, roles=self.roles, calls_in_text=self.calls_in_text)

    @property
    def places(self) -> set[str]:
        """All of its places."""
        values = (getattr(self, entry.name) for entry in dataclasses.fields(self))
        return {path for value in values if isinstance(value, tuple) for path in value} | {self.reference}

    @property
    def first_steps(self) -> set[str]:
        """The columns that its places are in."""
        return {step for path in self.places for step in (path, *_steps(path)[:1])}

    @property
    def has_prompt(self) -> bool:
        """Whether it says where the prompt is; otherwise it adds to the layout that is recognised."""
        return bool(self.messages or self.user)

    @classmethod
    def from_pairs(cls, pairs: dict[str, Any]) -> Columns:
        """From a mapping file or ``--column`` options; an unknown name is an error that names the nearest."""
        known = [entry.name for entry in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for name, value in pairs.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise DataError(
                    f"column mapping: unknown name {name!r}, "
                    + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
                )
            values[name] = _checked(name, value)
        columns = cls(**values)
        has_reference = bool(columns.answer or columns.calls or columns.response or columns.reference not in REFERENCES)
        if has_reference and not columns.has_prompt and columns.answer:
            raise DataError("column mapping: say where the prompt is (user=... or messages=...)")
        if columns.user and not has_reference:
            raise DataError("column mapping: say where the reference answer is (answer=..., calls=... or response=...)")
        return columns


def _checked(name: str, value: Any) -> Any:
    if name in ("message", "roles"):
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise DataError(f"column mapping: {name} must hold names, for example `roles: {{human: user}}`")
        wrong = (
            [v for v in value.values() if v not in ROLES]
            if name == "roles"
            else [k for k in value if k not in ("role", "content")]
        )
        if wrong:
            known = ", ".join(ROLES) if name == "roles" else "role, content"
            raise DataError(f"column mapping: {name} names {wrong[0]!r}, expected one of {known}")
        return {str(key): item for key, item in value.items()}
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise DataError(f"column mapping: {name} is {value!r}, expected one of {', '.join(_CHOICES[name])}")
        return value
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not paths or not all(isinstance(p, str) and p for p in paths):
        raise DataError(f"column mapping: {name} must name a column, got {value!r}")
    return paths[0] if name in ("reference", "calls_in_text") else tuple(paths)


def load_columns(path: str | None, pairs: Sequence[str]) -> Columns | None:
    """Columns from a YAML file and ``name=column`` options (the options win); None if neither is given."""
    values: dict[str, Any] = {}
    if path:
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"--mapping {path}: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"--mapping {path} must hold names and columns, for example `user: question`")
    given: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals:
            raise DataError(f"--column {pair!r} is not of the form NAME=COLUMN, for example user=question")
        if name in given and given[name] != column:
            raise DataError(f"--column {name} is given twice: {given[name]} and {column}")
        given[name] = column
    values.update(given)
    return Columns.from_pairs(values) if values else None


_ABSENT = object()


@lru_cache(maxsize=256)
def _steps(path: str) -> list[str]:
    return _STEP.findall(path)


def look_up(row: Any, paths: Paths) -> Any:
    """The value of the first path that leads to one; None where none does."""
    for path in paths:
        found = _follow(row, path)
        if found is not _ABSENT and found is not None:
            return found
    return None


def _follow(row: Any, path: str) -> Any:
    if isinstance(row, dict) and path in row:
        return row[path]
    if "." not in path and "[" not in path:
        return _ABSENT
    steps = _steps(path)
    if isinstance(row, dict) and steps[0] not in row:
        return _ABSENT
    value: Any = row
    for step in steps:
        value = parsed(value)
        index = step.strip("[]")
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and index.isdecimal() and int(index) < len(value):
            value = value[int(index)]
        else:
            return _ABSENT
    return value


def missing(row: Row, name: str, paths: Paths) -> RowError:
    """A needed place is not there: what is there instead, at the depth where the path ends."""
    path = paths[0]
    value: Any = row
    seen: list[str] = []
    for step in _STEP.findall(path):
        value = parsed(value)
        if not isinstance(value, dict) or step not in value:
            break
        value = value[step]
        seen.append(step)
    there = sorted(map(str, value)) if isinstance(value, dict) else []
    has = (
        f"{'.'.join(seen) or 'the row'} has {', '.join(there[:12]) or 'no columns'}"
        if isinstance(value, dict)
        else "it is null"
    )
    near = difflib.get_close_matches(path.split(".")[-1], there, n=1)
    return RowError(
        f"the mapped column {path!r} is missing; {has}",
        f"did you mean --column {name}={'.'.join([*seen, near[0]])}?" if near else "",
    )
