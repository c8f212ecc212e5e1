"""Labels of whole turns: hand-made cases, the golden texts, dialects, multi-turn rollouts."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rest.regions import HERMES, LLAMA3_JSON, TOOLRL, TokenRegion, label_regions, label_rollout
from tests.regions.golden import TEXTS, pieces

CONTEXT, FORMAT, THINK, NAME, ARGS, RESPONSE = TokenRegion


def by_region(text: str, region: TokenRegion, **options: object) -> str:
    """The bytes of ``text`` that carry ``region``, found with one token per byte."""
    raw = text.encode()
    ids = label_regions([raw[i : i + 1] for i in range(len(raw))], **options)  # type: ignore[arg-type]
    return bytes(b for b, r in zip(raw, ids, strict=True) if r == region).decode(errors="replace")


@pytest.mark.parametrize(
    ("name", "total", "think", "tool_name", "args", "response"),
    [
        ("A", 38, 5, 1, 8, 0),
        ("B", 64, 5, 2, 16, 0),
        ("C", 19, 5, 0, 0, 3),
        ("D", 37, 35, 0, 0, 0),
        ("E", 28, 1, 1, 2, 0),
        ("F", 36, 1, 1, 10, 0),
        ("G", 39, 1, 3, 11, 0),
        ("H", 38, 5, 1, 8, 0),
        ("J", 8, 0, 0, 0, 0),
    ],
)
def test_golden_counts(name: str, total: int, think: int, tool_name: int, args: int, response: int) -> None:
    counts = np.bincount(label_regions(pieces(TEXTS[name])), minlength=6).tolist()
    assert counts == [0, total - think - tool_name - args - response, think, tool_name, args, response]


def test_name_after_arguments_that_hold_a_name_key() -> None:
    assert by_region(TEXTS["F"], NAME) == "f"
    assert by_region(TEXTS["F"], ARGS) == '{"name": "z"}'


def test_braces_and_spaces_inside_strings() -> None:
    assert by_region(TEXTS["G"], NAME) == "Get Team"
    assert by_region(TEXTS["G"], ARGS) == '{"q": "}{"}'


def test_a_tag_mentioned_in_the_thought_opens_nothing() -> None:
    assert by_region(TEXTS["H"], THINK) == "use <tool_call> b"
    assert by_region(TEXTS["H"], NAME) == "f"


@pytest.mark.parametrize(
    ("body", "names", "args"),
    [
        ('{"name": "a\\"b", "arguments": {}}', 'a\\"b', "{}"),
        ('{"id": {"name": "no"}, "name": "f", "parameters": [1, {"x": 2}]}', "f", '[1, {"x": 2}]'),
        ('{"name": "f", "arguments": "{\\"k\\": 1}"}', "f", '"{\\"k\\": 1}"'),
        ('{"name": "f", "arguments": null}', "f", "null"),
        ('[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]', "fg", "{}{}"),
        ('{"name": "f", "parameters": {"k": 1}\n{"name": "g", "parameters": {}}', "fg", '{"k": 1}{}'),  # } missing
        ('{"name": "f\n{"name": "g", "parameters": {}}', "fg", "{}"),  # quote missing: a string ends at the newline
        ('{"name": "a", "name": "f", "parameters": {}}', "f", "{}"),  # json.loads keeps the last
        ('{"name" : "f" , "parameters" :{ } }', "f", "{ }"),
        ('{"name": 5, "parameters": {}}', "", "{}"),
        ('{"name": ', "", ""),
        ('{"name": "ge', "ge", ""),
        ('{"name": "f", "parameters": {"k": [1, "un', "f", '{"k": [1, "un'),
        ("get_weather(city)", "", ""),
        ('{"a": 1, {"name": "f", "parameters": {}}', "f", "{}"),
        ("}}]]{", "", ""),
        ("", "", ""),
    ],
)
def test_call_bodies(body: str, names: str, args: str) -> None:
    for text in (f"<tool_call>\n{body}\n</tool_call>", f"<think>t</think><tool_call>{body}"):
        assert by_region(text, NAME).rstrip("\n") == names
        assert by_region(text, ARGS).rstrip("\n") == args


def test_an_escaped_quote_at_the_cut_belongs_to_the_name() -> None:
    assert by_region('<tool_call>{"name": "f\\"', NAME) == 'f\\"'


def test_unclosed_sections_run_to_the_end_marker() -> None:
    text = "<think>on and on<|im_end|>"
    assert by_region(text, THINK) == "on and on"
    assert by_region(text, FORMAT) == "<think><|im_end|>"
    assert by_region("<response>cut o", RESPONSE) == "cut o"


def test_the_template_opened_the_thought() -> None:
    text = "hm</think>\n<response>hi</response><|im_end|>"
    assert by_region(text, THINK, starts_in_think=True) == "hm"
    assert by_region(text, THINK) == ""
    assert by_region(text, RESPONSE) == "hi"
    with pytest.raises(ValueError, match="no think section"):
        label_regions([b"x"], starts_in_think=True, dialect=replace_sections())


def replace_sections() -> object:
    from dataclasses import replace

    return replace(TOOLRL, name="no_thought", sections=TOOLRL.sections[1:])


def test_a_new_turn_starts_behind_an_end_marker() -> None:
    text = "<think>a<|im_end|>\n<think>b</think><response>c</response><|im_end|>"
    assert by_region(text, THINK) == "ab"
    assert by_region(text, RESPONSE) == "c"


def test_priority_of_a_token_on_two_regions() -> None:
    tokens = [
        b"<think>",
        b"a.</",
        b"think>\n<tool_",
        b'call>{"',
        b'name":"f',
        b'","parameters":{"k":',
        b"1}}",
        b"</tool_call>",
    ]
    assert label_regions(tokens).tolist() == [FORMAT, FORMAT, FORMAT, FORMAT, NAME, ARGS, ARGS, FORMAT]


def test_half_characters_and_empty_tokens() -> None:
    snow = "❄".encode()
    tokens = [b"<think>", snow[:1], snow[1:], b"", b"</think>", b""]
    assert label_regions(tokens).tolist() == [FORMAT, THINK, THINK, FORMAT, FORMAT, FORMAT]
    assert label_regions([]).shape == (0,)
    assert label_regions([b"", b""]).tolist() == [FORMAT, FORMAT]
    assert label_regions([b"x"]).dtype == np.int8


def test_a_non_canonical_split_keeps_every_label() -> None:
    """R2 of the golden vectors: both halves of a split name are name, nothing behind it moves."""
    text = '<think>ok</think>\n<tool_call>\n{"name": "Search Managers", "parameters": {"name": "Ann"}}\n</tool_call>'
    canonical = pieces(text)
    at = canonical.index(b"Search")
    sampled = [*canonical[:at], b"S", b"earch", *canonical[at + 1 :]]
    whole, split = label_regions(canonical).tolist(), label_regions(sampled).tolist()
    assert split == [*whole[:at], NAME, NAME, *whole[at + 1 :]]


def test_multi_turn_rollout_labels_each_sampled_run() -> None:
    first = pieces('<think>a</think>\n<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>')
    tool = [b"<tool_call>", b"obs", b"<think>"]  # a tool's output may hold anything
    second = pieces("<think>b</think>\n<response>c</response>")
    mask = np.array([True] * len(first) + [False] * len(tool) + [True] * len(second))
    ids = label_rollout([*first, *tool, *second], mask)
    expected = [*label_regions(first), *[CONTEXT] * len(tool), *label_regions(second)]
    assert ids.tolist() == [int(i) for i in expected]
    with pytest.raises(ValueError, match="loss_mask has shape"):
        label_rollout(first, mask)


def test_starts_in_think_holds_for_every_turn_of_a_rollout() -> None:
    tokens = [b"a", b"</think>", b"obs", b"b", b"</think>"]
    ids = label_rollout(tokens, np.array([1, 1, 0, 1, 1], dtype=bool), starts_in_think=True)
    assert ids.tolist() == [THINK, FORMAT, CONTEXT, THINK, FORMAT]


def test_hermes_one_block_a_call_and_free_answers() -> None:
    text = (
        "<think>\nhm\n</think>\n\nLet me look.\n"
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>'
    )
    assert by_region(text, NAME, dialect=HERMES) == "fg"
    assert by_region(text, ARGS, dialect=HERMES) == '{"a": 1}{}'
    assert by_region(text, RESPONSE, dialect=HERMES) == "Let me look."
    assert by_region("stray</think> text", FORMAT, dialect=HERMES) == "</think> "


def test_llama_json_without_tags() -> None:
    text = '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}<|eom_id|>'
    for turn in (text, text.removeprefix("<|python_tag|>")):
        assert by_region(turn, NAME, dialect=LLAMA3_JSON) == "fg"
        assert by_region(turn, ARGS, dialect=LLAMA3_JSON) == '{"a": 1}{}'
        assert by_region(turn, RESPONSE, dialect=LLAMA3_JSON) == ""
    assert by_region('Sure: {"name": "f"}<|eot_id|>', RESPONSE, dialect=LLAMA3_JSON) == 'Sure: {"name": "f"}'


def test_dialects_refuse_tags_that_match_everywhere() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="empty tag"):
        replace(TOOLRL, end_markers=(b"",))
    with pytest.raises(ValueError, match="same opening tag"):
        replace(TOOLRL, sections=TOOLRL.sections[:1] * 2)
