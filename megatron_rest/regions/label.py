"""One pass over the bytes of a turn, then one reduction per token.

    bytes of the sampled tokens, joined --scan, left to right--> (start, end, region) spans --paint--> one code a byte
      --maximum over the bytes of a token--> one region a token

The scan decides on bytes only, so the labels do not depend on how the same bytes were split into tokens: a token
carries the highest-priority region among its bytes, NAME > ARGS > FORMAT > THINK > RESPONSE > CONTEXT (the published
code takes the larger *weight*, which is the same order at its gammas).  An unclosed section runs to the end of the
turn, so truncated and malformed answers are covered too: a run-away thought must feel its penalty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.regions.dialects.toolrl import TOOLRL
from megatron_rest.token_region import TokenRegion

__all__ = ["label_regions", "label_rollout", "region_spans", "turn_starts"]

Span = tuple[int, int, TokenRegion]

_BY_PRIORITY = (
    TokenRegion.CONTEXT,
    TokenRegion.RESPONSE,
    TokenRegion.THINK,
    TokenRegion.FORMAT,
    TokenRegion.TOOL_ARGS,
    TokenRegion.TOOL_NAME,
)
_REGION_OF_PRIORITY = np.array(_BY_PRIORITY, dtype=np.int8)
_PRIORITY = {region: priority for priority, region in enumerate(_BY_PRIORITY)}


def label_regions(tokens: Sequence[bytes], *, starts_in_think: bool = False, dialect: Dialect = TOOLRL) -> np.ndarray:
    """Region of every token of one sampled turn (or of several, each ended by an end marker).

    Args:
        tokens: the bytes of each sampled token, in order, the end-of-turn token included; any bytes, cut anywhere.
        starts_in_think: the prompt already opened the thought (Qwen3 Thinking templates end in ``<think>``).
        dialect: which tags and JSON keys to look for.

    Returns:
        int8 ``[n]``, values of :class:`TokenRegion`.  Every token has exactly one; a token without bytes is glue.

    Raises:
        ValueError: ``starts_in_think`` with a dialect that has no thought section.  No token content ever raises.
    """
    if starts_in_think and dialect.thought is None:
        raise ValueError(f"dialect {dialect.name} has no think section to start in: pass starts_in_think=False")
    lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
    text = b"".join(tokens)
    region_ids = np.full(len(tokens), dialect.glue, dtype=np.int8)
    if not text:
        return region_ids
    codes = _paint(text, starts_in_think, dialect)
    has_bytes = lengths > 0
    starts = (np.cumsum(lengths) - lengths)[has_bytes]
    region_ids[has_bytes] = _REGION_OF_PRIORITY[np.maximum.reduceat(codes, starts)]
    return region_ids


def region_spans(
    text: bytes, *, starts_in_think: bool = False, dialect: Dialect = TOOLRL
) -> tuple[np.ndarray, np.ndarray]:
    """The same regions as runs of bytes, for storing: they hold for every tokenizer.

    Args:
        text: the bytes of one turn (or of several).
        starts_in_think: as in :func:`label_regions`.
        dialect: as in :func:`label_regions`.

    Returns:
        (ends, region_ids): int32 and int8 ``[n]``.  Run ``i`` covers bytes ``ends[i - 1] .. ends[i]`` (from 0 for the
        first, up to ``len(text)`` for the last); neighbours differ.  Both are empty for an empty text.
    """
    codes = _paint(text, starts_in_think, dialect)
    ends = np.append(np.flatnonzero(codes[1:] != codes[:-1]) + 1, len(text))[: len(text)].astype(np.int32)
    return ends, _REGION_OF_PRIORITY[codes[ends - 1]]


def label_rollout(
    tokens: Sequence[bytes],
    loss_mask: np.ndarray,
    *,
    starts_in_think: bool | Sequence[bool] = False,
    dialect: Dialect = TOOLRL,
) -> np.ndarray:
    """Regions of a multi-turn rollout: every run of sampled tokens is a turn of its own, tool outputs are CONTEXT.

    Args:
        tokens: bytes of each token, sampled or appended.
        loss_mask: bool ``[n]``, True where the policy sampled the token.
        starts_in_think: the template opens the thought of *every* assistant turn; or, turn by turn
            (:func:`turn_starts`), whether it did.
        dialect: as in :func:`label_regions`.

    Returns:
        int8 ``[n]``.  Raises ValueError if the lengths differ.
    """
    mask = np.asarray(loss_mask, dtype=bool)
    if mask.shape != (len(tokens),):
        raise ValueError(f"loss_mask has shape {mask.shape}, expected ({len(tokens)},) like tokens")
    region_ids = np.full(len(tokens), TokenRegion.CONTEXT, dtype=np.int8)
    turns = _turns(mask)
    opened = [starts_in_think] * len(turns) if isinstance(starts_in_think, bool) else starts_in_think
    for (start, end), is_open in zip(turns, opened, strict=True):
        region_ids[start:end] = label_regions(tokens[start:end], starts_in_think=is_open, dialect=dialect)
    return region_ids


def turn_starts(loss_mask: np.ndarray) -> list[int]:
    """Where each run of sampled tokens begins."""
    return [int(start) for start, _ in _turns(np.asarray(loss_mask, dtype=bool))]


def _turns(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(np.concatenate(([0], mask.view(np.int8), [0])))).reshape(-1, 2)


def _paint(text: bytes, starts_in_think: bool, dialect: Dialect) -> np.ndarray:
    """uint8 [bytes]: the priority of each byte's region."""
    codes = np.full(len(text), _PRIORITY[dialect.glue], dtype=np.uint8)
    for start, end, region in _scan(text, starts_in_think, dialect):
        codes[start:end] = _PRIORITY[region]
    return codes


def _scan(text: bytes, starts_in_think: bool, dialect: Dialect) -> Iterator[Span]:
    """Spans of ``text`` that are not glue, turn by turn."""
    opened = dialect.thought if starts_in_think else None
    start = 0
    for marker in dialect.end_pattern.finditer(text):
        yield from _scan_turn(text, start, marker.start(), opened, dialect)
        start, opened = marker.end(), None
    yield from _scan_turn(text, start, len(text), opened, dialect)


def _scan_turn(text: bytes, start: int, end: int, opened: Section | None, dialect: Dialect) -> Iterator[Span]:
    for segment in dialect.grammar(text, start, end, opened, dialect):
        if segment.region is not None:
            yield segment.start, segment.end, segment.region
            continue
        for call in dialect.calls.scan(text, segment.start, segment.end):
            for first, last in call.arguments:
                yield first, last, TokenRegion.TOOL_ARGS
            if call.name is not None:
                yield *call.name, TokenRegion.TOOL_NAME
