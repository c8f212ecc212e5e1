"""gpt-oss: messages with a channel each; analysis is the thought, a recipient makes a call, final is the answer.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

Headers, terminators and the recipient's namespace are FORMAT.  Text without a header is text for the user, as the
serving engine recovers it.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator

from megatron_rest.regions.call_formats.harmony import HEADER, HarmonyCalls
from megatron_rest.regions.dialect import Dialect, Section, Segment
from megatron_rest.token_region import TokenRegion

__all__ = ["HARMONY"]

_TERMINATOR = re.compile(rb"<\|end\|>|(?=<\|start\|>assistant)")
_REGIONS = {b"analysis": TokenRegion.THINK}


def _messages(text: bytes, start: int, end: int, opened: Section | None, dialect: Dialect) -> Iterator[Segment]:
    position = start
    if opened is not None:  # the prompt ends in the header of an analysis message
        position = yield from _body(text, position, position, end, TokenRegion.THINK)
    while position < end:
        header = HEADER.search(text, position, end)
        outside_end = header.start() if header else end
        outside = text[position:outside_end]
        if outside.strip():
            first = outside_end - len(outside.lstrip())
            yield Segment(first, first + len(outside.strip()), TokenRegion.RESPONSE)
        if header is None:
            return
        is_call = header["before"] is not None or header["behind"] is not None
        region = None if is_call else _REGIONS.get(header["channel"], TokenRegion.RESPONSE)
        if not is_call:
            yield Segment(header.start(), header.end(), TokenRegion.FORMAT, is_tag=True)
        position = yield from _body(text, header.start() if is_call else header.end(), header.end(), end, region)


def _body(text: bytes, first: int, body: int, end: int, region: TokenRegion | None) -> Generator[Segment, None, int]:
    """Segments of a message's body, which begins at ``body``; returns where the next message may begin."""
    terminator = _TERMINATOR.search(text, body, end)
    stop = terminator.start() if terminator else end
    # The last message of a turn ends with the turn itself, whose token is an end marker or was taken away.
    yield Segment(first, stop, region, is_closed=terminator is not None or region is not TokenRegion.THINK)
    if terminator is None:
        return end
    if terminator.end() > stop:
        yield Segment(stop, terminator.end(), TokenRegion.FORMAT, is_tag=True)
    return terminator.end()


HARMONY = Dialect(
    name="harmony",
    sections=(
        Section(open=b"<|channel|>analysis<|message|>", close=b"<|end|>", region=TokenRegion.THINK),
        Section(open=b"<|channel|>final<|message|>", close=None, region=TokenRegion.RESPONSE),
    ),
    outside=TokenRegion.RESPONSE,
    end_markers=(b"<|return|>", b"<|call|>", b"<|endoftext|>"),
    calls=HarmonyCalls(),
    grammar=_messages,
    one_call_a_turn=True,
    thought_form="<|channel|>analysis<|message|>{}<|end|>",
    response_form="<|start|>assistant<|channel|>final<|message|>{}",
    before_calls="<|end|>",
    turn_start="<|start|>assistant",
    control_tokens=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"),
    call_end="<|call|>",
    turn_end="<|return|>",
    vllm_parser="openai",
    vllm_parser_reads_text=False,
)
