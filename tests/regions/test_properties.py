"""Properties over random bytes, grammar soup and prefixes of real answers, seeded; the extended tier tries 10^5 cases.

For longer runs: ``python -m tests.regions.fuzz --seconds 3600``.

Cheap cases are drawn with numpy in one test (hypothesis spends far longer on a case than the labeller does); hypothesis
covers the structured ones, where a small counterexample is worth having.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rest.regions import (
    HERMES,
    LLAMA3_JSON,
    TOOLRL,
    TOOLRL_TAGS_ONLY,
    Dialect,
    TokenRegion,
    label_regions,
    region_spans,
)
from tests.regions.golden import TEXTS
from tests.regions.samples import sample_answers

DIALECTS = (TOOLRL, TOOLRL_TAGS_ONLY, HERMES, LLAMA3_JSON)
PRIORITY = [
    TokenRegion.CONTEXT,
    TokenRegion.RESPONSE,
    TokenRegion.THINK,
    TokenRegion.FORMAT,
    TokenRegion.TOOL_ARGS,
    TokenRegion.TOOL_NAME,
]
FRAGMENTS = [
    *(b"<think> </think> <tool_call> </tool_call> <response> </response> <|im_end|> <|eot_id|> <|python_tag|>").split(),
    *(b'{ } [ ] " \\ : , \n 1 {"name": "parameters": "arguments": "f" {}').split(b" "),
    *(b"<", b"/think>", b"tool_", "é".encode(), b"\xff", b" ", b"word", b'"name"', b"\\u00e9", b"null"),
]
soup = st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=3), max_size=40).map(b"".join)
texts = soup | st.binary(max_size=80) | st.sampled_from([text.encode() for text in TEXTS.values()])


def single_bytes(text: bytes) -> list[bytes]:
    return [text[i : i + 1] for i in range(len(text))]


def cut(text: bytes, points: list[int]) -> list[bytes]:
    edges = [0, *sorted(point % (len(text) + 1) for point in points), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def fuzz(rng: random.Random, *, num_cases: int) -> None:
    """Random token lists: labelled without error, every token covered, none of them CONTEXT."""
    for case in range(num_cases):
        if case % 2:
            tokens = [rng.randbytes(rng.randrange(4)) for _ in range(rng.randrange(30))]
        else:
            tokens = rng.choices(FRAGMENTS, k=rng.randrange(25))
        ids = label_regions(tokens, starts_in_think=case % 8 < 4, dialect=DIALECTS[(0, 2, 3)[case % 3]])
        assert len(ids) == len(tokens)
        assert ids.all(), tokens


def expected_of_split(text: bytes, tokens: list[bytes], by_byte: np.ndarray, dialect: Dialect) -> list[int]:
    """The rule itself: a token carries the highest-priority region among its bytes."""
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    labels = []
    for token, end in zip(tokens, ends, strict=True):
        found = {int(r) for r in by_byte[end - len(token) : end]}
        labels.append(int(max(found, key=PRIORITY.index)) if found else int(dialect.glue))
    return labels


def tiers(main: int, extended: int) -> pytest.MarkDecorator:
    """How many cases ``make test`` tries, and how many the extended tests."""
    return pytest.mark.parametrize("num_cases", [main, pytest.param(extended, marks=pytest.mark.extended)])


@tiers(500, 2500)
def test_labels_do_not_depend_on_the_split(num_cases: int) -> None:
    @settings(max_examples=num_cases, deadline=None, derandomize=True)
    @given(text=texts, points=st.lists(st.integers(0, 10_000), max_size=12), dialect=st.sampled_from(DIALECTS))
    def check(text: bytes, points: list[int], dialect: Dialect) -> None:
        tokens = cut(text, points)
        by_byte = label_regions(single_bytes(text), dialect=dialect)
        assert label_regions(tokens, dialect=dialect).tolist() == expected_of_split(text, tokens, by_byte, dialect)

    check()


@tiers(300, 1500)
def test_labels_partition_the_tokens(num_cases: int) -> None:
    @settings(max_examples=num_cases, deadline=None, derandomize=True)
    @given(text=texts, in_think=st.booleans(), dialect=st.sampled_from(DIALECTS))
    def check(text: bytes, in_think: bool, dialect: Dialect) -> None:
        ids = label_regions(single_bytes(text), starts_in_think=in_think, dialect=dialect)
        assert len(ids) == len(text)
        possible = {dialect.glue, dialect.outside, *PRIORITY[1:]}
        assert {int(i) for i in ids} <= {int(r) for r in possible}
        if dialect is not TOOLRL_TAGS_ONLY:
            assert (ids != TokenRegion.CONTEXT).all()

    check()


@tiers(20_000, 100_000)
def test_random_bytes_and_soup_never_raise_and_are_covered(num_cases: int) -> None:
    fuzz(random.Random(20250926), num_cases=num_cases)


@pytest.mark.parametrize(("every", "at_least"), [(10, 5_000), pytest.param(2, 40_000, marks=pytest.mark.extended)])
def test_every_prefix_of_valid_answers_is_covered(every: int, at_least: int) -> None:
    """All prefixes of the structured part and of the shortened thought of real answers."""
    cases = 0
    for answer in sample_answers()[::every]:
        thought, close, rest = answer.partition("</think>")
        raw = (thought[:40] + close + rest).encode()
        tokens = single_bytes(raw)
        for end in range(len(raw)):
            ids = label_regions(tokens[:end])
            assert len(ids) == end
            assert ids.all()
            cases += 1
    assert cases > at_least


def test_a_megabyte_of_hostile_text_takes_linear_time() -> None:
    """Nested brackets, quotes and tags must not make the scan quadratic."""
    for unit in (b"{", b'{"a":', b'"', b"\\", b"[", b"<think>", b"</tool_call>", b'{"name":"', b"<tool_call>{", b"}{"):
        text = b"<tool_call>" + unit * (300_000 // len(unit))
        assert len(label_regions([text[i : i + 4] for i in range(0, len(text), 4)])) == -(-len(text) // 4)


@settings(max_examples=200, deadline=None)
@given(text=texts, starts_in_think=st.booleans())
def test_spans_are_the_labels_of_single_bytes(text: bytes, starts_in_think: bool) -> None:
    ends, region_ids = region_spans(text, starts_in_think=starts_in_think)
    assert (ends.dtype, region_ids.dtype) == (np.int32, np.int8)
    assert (
        np.repeat(region_ids, np.diff(ends, prepend=0)).tolist()
        == label_regions(single_bytes(text), starts_in_think=starts_in_think).tolist()
    )
    assert (np.diff(region_ids) != 0).all(), "runs are as long as they can be"
