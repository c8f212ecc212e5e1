"""A turn's text -> its thought, its calls and its answer for the user: what rewards, environments and evaluation read.

The segments and the calls in them are those that regions are painted from (``dialect.py``, ``call_formats/``).  The
text comes from a policy, so it is hostile: sizes, nesting and numbers are bounded before a parser sees them, nothing is
evaluated, and nothing raises; what cannot be read is an error that says where and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rest.regions.calls import Limits, Schemas, Span, ToolCall, ToolCallError, decoded, load_json, shown
from megatron_rest.regions.dialect import Dialect, Segment
from megatron_rest.regions.dialects.toolrl import TOOLRL
from megatron_rest.token_region import TokenRegion

__all__ = ["REFERENCE_LIMITS", "Turn", "answer_prefix", "in_tags", "is_thought_open", "read_turn"]

REFERENCE_LIMITS = Limits(characters=1 << 24, depth=256, calls=1 << 12)
"""For text that is data of the user's own: bounded by what a computer bears, not by what an answer may be."""
_NO_SCHEMAS: Mapping[str, Mapping[str, object]] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn as its dialect reads it."""

    thought: str | None  # None: no thought was opened
    is_thought_closed: bool
    calls: tuple[ToolCall, ...]
    errors: tuple[str, ...]  # of call sections: what is no call
    response: str | None  # text for the user; None: there is none
    has_calls: bool  # a call section was opened, whatever is in it
    is_closed: bool  # every call section is
    is_response_closed: bool  # and every section of the answer


def read_turn(
    text: str,
    *,
    dialect: Dialect = TOOLRL,
    starts_in_think: bool = False,
    schemas: Schemas = _NO_SCHEMAS,
    limits: Limits | None = None,
) -> Turn:
    """Read one turn, up to its first end marker.

    Args:
        text: what the policy wrote.
        dialect: how it writes.
        starts_in_think: the prompt already opened the thought.
        schemas: ``{tool: {parameter: schema}}``, for dialects that write values without types.
        limits: bounds of what is parsed; None = those for a policy's text.
    """
    limits = limits or Limits()
    raw = text.encode("utf-8", "surrogatepass")
    end_marker = dialect.end_pattern.search(raw)
    end = end_marker.start() if end_marker else len(raw)
    opened = dialect.thought if starts_in_think else None
    thoughts: list[Segment] = []
    said: list[Segment] = []
    blocks: list[Segment] = []
    for segment in dialect.grammar(raw, 0, end, opened, dialect):
        if segment.is_tag:
            continue
        match segment.region:
            case None:
                blocks.append(segment)
            case TokenRegion.THINK:
                thoughts.append(segment)
            case TokenRegion.RESPONSE:
                said.append(segment)
    calls: list[ToolCall] = []
    errors: list[str] = []
    for number, block in enumerate(blocks, start=1):
        found, wrong = _read_block(raw, block, dialect, schemas, limits)
        calls += found
        errors += [f"tool_call block {number}: {error}" for error in wrong]
        if len(calls) > limits.calls or number > limits.calls:
            calls, errors = [], [f"more than {limits.calls} calls in one answer"]
            break
    response = "\n".join(decoded(raw[s.start : s.end]) for s in said).strip()
    return Turn(
        thought="\n".join(decoded(raw[t.start : t.end]).strip() for t in thoughts) if thoughts or opened else None,
        is_thought_closed=all(t.is_closed for t in thoughts) and bool(thoughts),
        calls=tuple(calls),
        errors=tuple(errors),
        response=response if said else None,
        has_calls=bool(blocks),
        is_closed=all(block.is_closed for block in blocks),
        is_response_closed=all(segment.is_closed for segment in said),
    )


def _read_block(
    raw: bytes, block: Segment, dialect: Dialect, schemas: Schemas, limits: Limits
) -> tuple[list[ToolCall], list[str]]:
    size = block.end - block.start
    if size > limits.characters:
        return [], [f"the block has {size} characters, more than {limits.characters}"]
    calls: list[ToolCall] = []
    errors: list[str] = []
    position = block.start
    for span in dialect.calls.scan(raw, block.start, block.end):
        errors += _junk(raw, (position, span.start), dialect)
        position = span.end
        try:
            calls.append(dialect.calls.load(raw, span, limits, schemas))
        except ToolCallError as error:
            errors.append(str(error))
        if len(calls) + len(errors) > limits.calls:
            return calls, errors
    errors += _junk(raw, (position, block.end), dialect)
    if not calls and not errors:
        errors = ["an empty section" if not raw[block.start : block.end].strip() else "no call in it"]
    return calls, errors[:1]


def _junk(raw: bytes, gap: Span, dialect: Dialect) -> list[str]:
    """What stands between calls and is neither white space nor a separator."""
    if dialect.calls.glue.fullmatch(raw, *gap):  # nearly always: white space, and ASCII
        return []
    text = decoded(raw[gap[0] : gap[1]])
    if dialect.calls.glue.fullmatch(text.translate(_LINE_ENDS).encode("utf-8", "surrogatepass")):
        return []
    try:
        value = load_json(text, Limits())
    except ToolCallError:
        return [f"{shown(text)} is not JSON or any other call"]
    if isinstance(value, dict):
        return [f"{shown(text)} is an object, which is not how {dialect.name} writes calls"]
    return [f"{shown(text)} is a {type(value).__name__}, expected an object"]


_LINE_ENDS = dict.fromkeys(map(ord, "\x1c\x1d\x1e\x85\u2028\u2029\xa0"), " ")  # Python's white space beyond ASCII's


def answer_prefix(prompt: bytes, dialect: Dialect = TOOLRL) -> str:
    """What the generation prompt has already written of the answer: an opened thought, or an empty one, else nothing.

    The first is what Qwen3-Thinking and DeepSeek-R1's distills do, the second Qwen3 with its thinking switched off;
    DeepSeek-V3.1 and GLM-4.7 write the closing tag alone, which says the same as an empty thought and is given as one.
    """
    for section in dialect.sections:
        if section.region is not TokenRegion.THINK or section.close is None:
            continue
        body = prompt.rstrip()
        if body.endswith(section.open):
            return prompt[len(body) - len(section.open) :].decode("utf-8", "replace")
        if body.endswith(section.close):
            opening = body[: -len(section.close)].rstrip()
            if opening.endswith(section.open):
                return prompt[len(opening) - len(section.open) :].decode("utf-8", "replace")
            return (section.open + prompt[len(body) - len(section.close) :]).decode("utf-8", "replace")
    return ""


def is_thought_open(prefix: str, dialect: Dialect = TOOLRL) -> bool:
    """Whether what a prompt has written of the answer (:func:`answer_prefix`) leaves a thought open."""
    opens = [section.open.decode() for section in dialect.sections if section.region is TokenRegion.THINK]
    return bool(prefix) and prefix.rstrip().endswith(tuple(opens))


def in_tags(text: str, dialect: Dialect, schemas: Schemas = _NO_SCHEMAS) -> str:
    """A turn of any dialect in ToolRL's tags, which files of answers keep: they are scored without the model at hand.

    What is unreadable stays so: its errors stand in a block of their own.
    """
    if dialect is TOOLRL:
        return text
    turn = read_turn(text, dialect=dialect, schemas=schemas)
    calls = [(call.name, call.parameters) for call in turn.calls]
    unclosed = ("a call section is never closed",) if turn.has_calls and not turn.is_closed and not calls else ()
    wrong = "".join(f"\n<tool_call>\n{error}\n</tool_call>" for error in (*turn.errors, *unclosed))
    return TOOLRL.write(calls, thought=turn.thought, response=turn.response) + wrong
