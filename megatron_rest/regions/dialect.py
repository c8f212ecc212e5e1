"""What a dialect is: how one model family writes thoughts, tool calls and answers for the user.

Adding a dialect is one file with one :class:`Dialect` value and its line in ``dialects/__init__.py``; no code reads a
dialect's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rest.regions.call_formats.json_objects import JsonCalls
from megatron_rest.regions.calls import CallFormat
from megatron_rest.token_region import TokenRegion

__all__ = ["Dialect", "Section", "Segment", "tagged_segments"]

_WHITE_SPACE = b" \t\r\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A stretch between an opening and a closing tag.  The tags themselves are FORMAT."""

    open: bytes
    close: bytes | None  # None: the section runs to the end of the turn
    region: TokenRegion | None  # region of the text inside; None: tool calls


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a turn: text of one region, or calls (``region`` None) for the dialect's format to scan."""

    start: int
    end: int
    region: TokenRegion | None
    is_closed: bool = True  # calls and sections: the closing tag is there, or none is needed
    is_tag: bool = False


Grammar = Callable[[bytes, int, int, "Section | None", "Dialect"], Iterator[Segment]]
"""``(text, start, end, section that is open at the start, dialect)`` -> segments of one turn, left to right."""


def tagged_segments(text: bytes, start: int, end: int, opened: Section | None, dialect: Dialect) -> Iterator[Segment]:
    """Sections between tags.  Inside a section only its own closing tag counts: one mentioned in a thought opens
    nothing."""
    sections = {section.open: section for section in dialect.sections}
    tags = dialect.tag_pattern
    position = start
    while position < end:
        if opened is None:
            tag = tags.search(text, position, end)
            outside_end = tag.start() if tag else end
            yield from _outside(text, position, outside_end, dialect)
            if tag is None:
                return
            yield Segment(tag.start(), tag.end(), TokenRegion.FORMAT, is_tag=True)
            position, opened = tag.end(), sections.get(tag.group())  # a stray closing tag opens nothing
            if opened is not None and position >= end:
                yield Segment(position, position, opened.region, is_closed=opened.close is None)
            continue
        close = text.find(opened.close, position, end) if opened.close is not None else -1
        inside_end = end if close < 0 else close
        yield Segment(position, inside_end, opened.region, is_closed=close >= 0 or opened.close is None)
        position = inside_end
        if close >= 0 and opened.close is not None:
            position = close + len(opened.close)
            yield Segment(close, position, TokenRegion.FORMAT, is_tag=True)
        opened = None


def _outside(text: bytes, start: int, end: int, dialect: Dialect) -> Iterator[Segment]:
    """Text outside sections without the white space around it, which is glue."""
    stripped = text[start:end].lstrip(_WHITE_SPACE)
    first = end - len(stripped)
    last = first + len(stripped.rstrip(_WHITE_SPACE))
    if first >= last:
        return
    is_call = dialect.bare_calls is not None and dialect.bare_calls.match(text, first, last)
    yield Segment(first, last, None if is_call else dialect.outside)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """One way of writing a turn.  Tags are compared as bytes, whether they are one token or many."""

    name: str
    sections: tuple[Section, ...]
    outside: TokenRegion  # text outside every section
    end_markers: tuple[bytes, ...]  # end of turn; what follows starts a new turn
    glue: TokenRegion = (
        TokenRegion.FORMAT
    )  # white space outside sections, what stands in calls beside names and arguments, end markers
    calls: CallFormat = field(default_factory=JsonCalls)
    bare_calls: re.Pattern[bytes] | None = None
    """A turn (or what follows a section) that starts so is tool calls without tags."""
    grammar: Grammar = tagged_segments
    one_call_a_turn: bool = False
    dotted_names: bool = True  # names may hold dots
    # How a turn is written (warm starts, references); the thought and the answer for the user go into "{}".
    thought_form: str = "<think>\n{}\n</think>\n\n"
    response_form: str = "{}"
    response_first: bool = True  # before the calls
    before_calls: str = "\n"  # between the answer for the user and the calls
    turn_start: str = ""  # that the generation prompt has written; what follows in a turn begins with it again
    call_end: str = ""  # end of a turn that makes calls, where it is not the template's end of turn
    turn_end: str = ""  # end of any other turn, where no template shows it
    control_tokens: tuple[str, ...] = ()  # that answers hold beside the sections' tags
    vllm_parser: str = ""  # the name of vLLM's tool parser that reads the same
    vllm_parser_reads_text: bool = True  # False: it reads token ids only
    types_are_written: bool = True  # False: "3" and 3 look the same, a schema decides
    tag_pattern: re.Pattern[bytes] = field(init=False, repr=False, compare=False)
    """Any opening or closing tag; the longest wins where one is a prefix of another."""
    end_pattern: re.Pattern[bytes] = field(init=False, repr=False, compare=False)
    """Any end-of-turn marker."""

    def __post_init__(self) -> None:
        tags = [tag for section in self.sections for tag in (section.open, section.close) if tag is not None]
        if not all(tags) or not all(self.end_markers):
            raise ValueError(f"dialect {self.name} has an empty tag or end marker: it would match everywhere")
        opens = [section.open for section in self.sections]
        if len(set(opens)) != len(opens):
            raise ValueError(f"dialect {self.name} has two sections with the same opening tag")
        object.__setattr__(self, "tag_pattern", _any_of(tags))
        object.__setattr__(self, "end_pattern", _any_of(self.end_markers))

    @property
    def thought(self) -> Section | None:
        """The section a turn starts in when the chat template itself wrote the opening think tag."""
        return next((section for section in self.sections if section.region is TokenRegion.THINK), None)

    def tags(self) -> tuple[str, ...]:
        """Tags as text: what a tokenizer may call special and is ordinary text of an answer all the same."""
        tags = [tag for section in self.sections for tag in (section.open, section.close) if tag is not None]
        return tuple(tag.decode() for tag in tags)

    def write(
        self, calls: Sequence[tuple[str, Mapping[str, Any]]], *, thought: str | None = None, response: str | None = None
    ) -> str:
        """A turn as a model of this dialect writes it, without its end of turn.

        Raises :class:`~megatron_rest.regions.calls.ToolCallError` for calls that the dialect cannot write.
        """
        said = self.response_form.replace("{}", response, 1) if response is not None else ""
        called = self.calls.write(calls) if calls else ""
        parts = [said, called] if self.response_first else [called, said]
        text = self.before_calls.join(part for part in parts if part)
        whole = (self.thought_form.replace("{}", thought, 1) if thought is not None else "") + text
        return whole.removeprefix(self.turn_start)


def _any_of(texts: Iterable[bytes]) -> re.Pattern[bytes]:
    longest_first = sorted(set(texts), key=lambda text: (-len(text), text))
    return re.compile(b"|".join(map(re.escape, longest_first)) or b"(?!)")
