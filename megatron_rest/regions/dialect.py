"""What a dialect is: the tags and JSON keys by which one model family writes thoughts, tool calls and answers.

Adding a dialect is one file with one :class:`Dialect` value; no code reads a dialect's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from megatron_rest.token_region import TokenRegion

__all__ = ["Dialect", "Section"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A stretch between an opening and a closing tag.  The tags themselves are FORMAT."""

    open: bytes
    close: bytes | None  # None: the section runs to the end of the turn
    region: TokenRegion | None  # region of the text inside; None: JSON tool calls, scanned for names and arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """One way of writing a turn.  Tags are compared as bytes, whether they are one token or many."""

    name: str
    sections: tuple[Section, ...]
    outside: TokenRegion  # text outside every section
    end_markers: tuple[bytes, ...]  # end of turn; what follows starts a new turn
    glue: TokenRegion = (
        TokenRegion.FORMAT
    )  # white space outside sections, JSON outside names and arguments, end markers
    name_key: bytes = b"name"
    args_keys: tuple[bytes, ...] = (b"arguments", b"parameters")
    bare_calls: bool = (
        False  # a turn (or what follows a section) that starts with "{" or "[" is a tool call without tags
    )

    def __post_init__(self) -> None:
        tags = [tag for section in self.sections for tag in (section.open, section.close) if tag is not None]
        if not all(tags) or not all(self.end_markers):
            raise ValueError(f"dialect {self.name} has an empty tag or end marker: it would match everywhere")
        opens = [section.open for section in self.sections]
        if len(set(opens)) != len(opens):
            raise ValueError(f"dialect {self.name} has two sections with the same opening tag")

    @property
    def thought(self) -> Section | None:
        """The section a turn starts in when the chat template itself wrote the opening think tag."""
        return next((section for section in self.sections if section.region is TokenRegion.THINK), None)


@lru_cache(maxsize=64)
def tag_pattern(dialect: Dialect) -> re.Pattern[bytes]:
    """Any opening or closing tag; the longest wins where one is a prefix of another."""
    tags = {tag for section in dialect.sections for tag in (section.open, section.close) if tag is not None}
    return re.compile(b"|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True)) or b"(?!)")


@lru_cache(maxsize=64)
def end_pattern(dialect: Dialect) -> re.Pattern[bytes]:
    """Any end-of-turn marker."""
    return re.compile(b"|".join(re.escape(m) for m in sorted(dialect.end_markers, key=len, reverse=True)) or b"(?!)")
