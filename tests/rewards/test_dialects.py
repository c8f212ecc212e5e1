"""The reward in every dialect: a reference earns its own reward however it is written, and half of it earns less."""

from __future__ import annotations

import unicodedata

import pytest

from megatron_rest.config import RewardConfig
from megatron_rest.regions import DIALECTS, HERMES, TOOLRL, Dialect
from megatron_rest.rewards import ReferenceAnswerError, tool_call_reward, why_not_earnable

TWO = (
    "<think> Both. </think>\n<tool_call>\n"
    '{"name": "w", "parameters": {"city": "Bern", "zip": "3000", "n": 1}}\n'
    '{"name": "v", "parameters": {}}\n</tool_call>'
)
CALLS = [("w", {"city": "Bern", "zip": "3000", "n": 1}), ("v", {})]
SPEAK = "<think> t </think>\n<response> Hello. </response>"
STATIC = RewardConfig(schedule=False)
EVERY = [pytest.param(dialect, id=name) for name, dialect in DIALECTS.items()]


def total(answer: str, reference: str, dialect: Dialect, **kwargs: str) -> float:
    return tool_call_reward(answer, reference, step=1, config=STATIC, dialect=dialect, **kwargs).total


@pytest.mark.parametrize("dialect", EVERY)
def test_a_reference_earns_full_marks_and_part_of_it_less(dialect: Dialect) -> None:
    calls = CALLS[:1] if dialect.one_call_a_turn else CALLS
    reference = TOOLRL.write(calls, thought="Both.")
    whole = dialect.write(calls, thought="Both.")
    assert total(whole, reference, dialect) == 4.0
    assert total(whole + dialect.end_markers[0].decode(), reference, dialect) == 4.0
    assert not why_not_earnable(whole, reference, config=STATIC, dialect=dialect)
    wrong = dialect.write([("w", {"city": "Thun", "zip": "3000", "n": 1}), *calls[1:]], thought="Both.")
    assert total(wrong, reference, dialect) < 4.0
    silent = dialect.write(calls)  # without the thought that the reference has
    assert total(silent, reference, dialect) == 3.0
    if len(calls) == 2:
        assert total(dialect.write(calls[:1], thought="Both."), reference, dialect) < 3.0


@pytest.mark.parametrize("dialect", EVERY)
def test_answers_without_calls(dialect: Dialect) -> None:
    spoken = tool_call_reward(
        dialect.write([], thought="t", response="Hi."), SPEAK, step=1, config=STATIC, dialect=dialect
    )
    assert spoken.is_format_valid and spoken.accuracy == 1.0
    called = tool_call_reward(dialect.write(CALLS[:1], thought="t"), SPEAK, step=1, config=STATIC, dialect=dialect)
    assert called.accuracy == 0.0 and not called.is_format_valid


@pytest.mark.parametrize("dialect", EVERY)
def test_what_the_prompt_has_written_counts(dialect: Dialect) -> None:
    assert dialect.thought is not None and dialect.thought.close is not None
    opening, closing = dialect.thought.open.decode(), dialect.thought.close.decode()
    reference = TOOLRL.write(CALLS[:1], thought="t")
    behind = f"t{closing}\n" + dialect.write(CALLS[:1])
    assert total(behind, reference, dialect, prefix=f"{opening}\n") == 4.0
    assert total(behind, reference, dialect) < 4.0
    assert total(dialect.write(CALLS[:1]), reference, dialect, prefix=f"{opening}\n\n{closing}\n\n") == 4.0


def test_several_blocks_are_one_answer_but_for_the_published_rule() -> None:
    blocks = HERMES.write(CALLS, thought="Both.")
    assert total(blocks, TWO, TOOLRL) == 4.0
    published = tool_call_reward(blocks, TWO, step=1, config=RewardConfig(accept_arguments=False, schedule=False))
    assert not published.is_format_valid
    for broken in (blocks.replace("</tool_call>", "", 1), blocks + "<tool_call>"):
        assert not tool_call_reward(broken, TWO, step=1, config=STATIC).is_format_valid


def test_composed_and_decomposed_texts_are_the_same() -> None:
    reference = TOOLRL.write([("Zürich", {"straße é": "é à"})], thought="t")
    for form in ("NFC", "NFD"):
        for other in ("NFC", "NFD"):
            answer, truth = unicodedata.normalize(form, reference), unicodedata.normalize(other, reference)
            assert total(answer, truth, TOOLRL) == 4.0
            assert total(unicodedata.normalize(form, HERMES.write([("Zürich", {"straße é": "é à"})], thought="t")),
                         truth, HERMES) == 4.0  # fmt: skip
    assert total(reference.replace("à", "a"), reference, TOOLRL) < 4.0


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ('{"name": "w", "arguments": "{\\"city\\": \\"Bern\\"}"}', 1),
        ('{"type": "function", "function": {"name": "w", "arguments": {"city": "Bern"}}}', 1),
        ('{"name": "w", "parameters": null, "arguments": {"city": "Bern"}}', 1),
        ('{"name": "w", "arguments": {"city": "Bern"}}\n\n{"name": "v", "parameters": {}}', 2),
    ],
)
def test_what_people_write_as_a_reference_is_read(body: str, calls: int) -> None:
    reference = f"<think> t </think>\n<tool_call>\n{body}\n</tool_call>"
    wanted = [("w", {"city": "Bern"}), ("v", {})][:calls]
    assert total(TOOLRL.write(wanted, thought="t"), reference, TOOLRL) == 4.0


def test_a_reference_that_earns_nothing_says_why() -> None:
    mention = TWO.replace("Both.", "I use <tool_call>.")
    assert "does not earn its own reward" in why_not_earnable(mention, mention, config=STATIC)
    assert not why_not_earnable(mention, mention, config=RewardConfig(opaque_thought=True))
    assert "cannot be parsed" in why_not_earnable("x", "<tool_call>x</tool_call>", config=STATIC)
    with pytest.raises(ReferenceAnswerError):
        tool_call_reward("x", "<tool_call>x</tool_call>", step=1)
