"""Does the answer have the sections that the reference has, in their order?

The reference's own tags decide which class of answer is wanted.  Relaxed (ResT's published code): first positions of
the tags in order, exactly one pair of each section, free text anywhere.  Strict (ToolRL): nothing but the sections,
exact newlines.
"""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_rest.rewards.findings import Finding
from megatron_rest.types import TokenRegion

__all__ = ["format_findings"]

_SECTIONS = ("tool_call", "response")


def format_findings(text: str, ground_truth: str, *, strict: bool, thought_end: int = 0) -> list[Finding]:
    """What breaks the format; empty = valid.

    Args:
        text: the answer, stripped.
        ground_truth: the reference answer.
        strict: ToolRL's rule instead of the relaxed one.
        thought_end: ignore section tags before this position (0: tags mentioned in the thought count, as published).
    """
    wanted = [name for name in _SECTIONS if f"<{name}>" in ground_truth]
    if not wanted:
        return _thought_only(text, strict)
    found = _tag_counts(text[thought_end:], wanted)
    if "<response>" not in ground_truth:
        # The published code forbids response tags where only a call is wanted, but not calls where only a response is.
        found += [
            _wrong(f"<{tag}> where only a tool call is wanted")
            for tag in ("response", "/response")
            if f"<{tag}>" in text[thought_end:]
        ]
    if found:
        return found
    if strict:
        return [] if _strict_pattern(tuple(wanted)).search(text) else [_wrong("not exactly the sections and newlines")]
    positions = [text.find("<think>"), text.find("</think>")]
    for name in wanted:
        positions += [text.find(f"<{name}>", thought_end), text.find(f"</{name}>", thought_end)]
    if positions[0] < 0 or positions[1] < 0:
        return [_wrong("no <think> ... </think> block")]
    if positions != sorted(positions):
        return [_wrong(f"sections out of order: expected think, {', '.join(wanted)}")]
    return []


def _wrong(message: str) -> Finding:
    return Finding(region=TokenRegion.FORMAT, message=message)


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
