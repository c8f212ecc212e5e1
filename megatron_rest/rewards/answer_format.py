"""Does the answer have the sections that the reference has, in their order?

The reference's own sections decide which class of answer is wanted.  ToolRL's tags, relaxed (ResT's published code):
positions of the tags in order, one pair of each section (of calls also several, as most models write them), free text
anywhere.  Strict (ToolRL): nothing but the sections, exact newlines.  Other dialects: :func:`turn_findings`.
"""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_rest.regions import Dialect, Turn
from megatron_rest.rewards.findings import Finding
from megatron_rest.rewards.parsing import Reference
from megatron_rest.token_region import TokenRegion

__all__ = ["format_findings", "turn_findings"]


def turn_findings(turn: Turn, reference: Reference, dialect: Dialect) -> list[Finding]:
    """What breaks the format in a dialect whose answers for the user have no tags; empty = valid.

    A thought is wanted where the reference has one; calls exactly where it makes some; text where it answers.
    """
    found: list[Finding] = []
    if turn.thought is not None and not turn.is_thought_closed:
        found.append(_wrong("the thought is never closed"))
    elif turn.thought is None and reference.thought is not None and dialect.thought is not None:
        found.append(_wrong("no thought where the reference has one"))
    if reference.wants_calls:
        if not turn.has_calls:
            found.append(_wrong("no call where the reference makes one"))
        elif not turn.is_closed:
            found.append(_wrong("a call section is never closed"))
        elif turn.errors:
            found.append(_wrong(turn.errors[0]))
    elif turn.has_calls:
        found.append(_wrong("a call where the reference makes none"))
    if reference.response and not turn.response:
        found.append(_wrong("no answer for the user"))
    return found


def format_findings(
    text: str, wanted: tuple[str, ...], *, strict: bool, thought_end: int = 0, several_blocks: bool = False
) -> list[Finding]:
    """What breaks the format of ToolRL's tags; empty = valid.

    Args:
        text: the answer, stripped.
        wanted: sections of the reference answer, of tool_call and response.
        strict: ToolRL's rule instead of the relaxed one.
        thought_end: ignore section tags before this position (0: tags mentioned in the thought count, as published).
        several_blocks: calls may stand in several blocks; False as published.
    """
    if not wanted:
        return _thought_only(text, strict)
    several_blocks &= not strict and "tool_call" in wanted and _alternate(text[thought_end:])
    found = _tag_counts(text[thought_end:], [name for name in wanted if name != "tool_call" or not several_blocks])
    if "response" not in wanted:
        # The published code forbids response tags where only a call is wanted, but not calls where only a response is.
        found += [
            _wrong(f"<{tag}> where only a tool call is wanted")
            for tag in ("response", "/response")
            if f"<{tag}>" in text[thought_end:]
        ]
    if found:
        return found
    if strict:
        return [] if _strict_pattern(wanted).search(text) else [_wrong("not exactly the sections and newlines")]
    positions = [text.find("<think>"), text.find("</think>")]
    for name in wanted:
        positions += [text.find(f"<{name}>", thought_end), text.rfind(f"</{name}>", thought_end)]
    if positions[0] < 0 or positions[1] < 0:
        return [_wrong("no <think> ... </think> block")]
    if positions != sorted(positions):
        return [_wrong(f"sections out of order: expected think, {', '.join(wanted)}")]
    return []


def _wrong(message: str) -> Finding:
    return Finding(region=TokenRegion.FORMAT, message=message)


def _alternate(text: str) -> bool:
    """Whether every opening tag of calls is followed by its closing one, and there is at least one pair."""
    tags = re.findall(r"</?tool_call>", text)
    return bool(tags) and tags == ["<tool_call>", "</tool_call>"] * (len(tags) // 2)


def _tag_counts(text: str, wanted: list[str]) -> list[Finding]:
    tags = [tag for name in wanted for tag in (f"<{name}>", f"</{name}>")]
    return [_wrong(f"{text.count(tag)} times {tag}, expected once") for tag in tags if text.count(tag) != 1]


def _thought_only(text: str, strict: bool) -> list[Finding]:
    if strict:
        return [] if re.search(r"^<think>.*?</think>$", text, re.DOTALL) else [_wrong("not exactly one think block")]
    return _tag_counts(text, ["think"])


@lru_cache(maxsize=8)
def _strict_pattern(wanted: tuple[str, ...]) -> re.Pattern[str]:
    body = {"tool_call": r"<tool_call>\n.*?\n</tool_call>", "response": r"<response>.*?</response>"}
    return re.compile(r"^<think>.*?</think>\n" + r"\n".join(body[name] for name in wanted) + "$", re.DOTALL)
