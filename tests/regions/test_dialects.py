"""Every dialect: written turns are read back and painted byte by byte, broken ones never raise, templates tell them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from megatron_rest.config import DIALECT_NAMES
from megatron_rest.regions import DIALECTS, Dialect, TokenRegion, dialects_named_in, label_regions, read_turn
from megatron_rest.regions.calls import ToolCallError
from megatron_rest.regions.read import answer_prefix, is_thought_open

CALLS: tuple[tuple[tuple[str, dict[str, Any]], ...], ...] = (
    (("cd", {"folder": "document"}),),
    (("get_weather", {"city": "Zürich", "days": 3, "units": None, "deep": {"a": [1, 2.5, True]}}),),
    (("now", {}), ("say", {"text": 'He said: "x\\y"\n{"name": "no"}', "zip": "12345"})),
)
SCHEMAS = {"say": {"zip": {"type": "string"}, "text": {"type": "string"}}}
NAME, ARGS, THINK, RESPONSE, FORMAT = (
    TokenRegion.TOOL_NAME,
    TokenRegion.TOOL_ARGS,
    TokenRegion.THINK,
    TokenRegion.RESPONSE,
    TokenRegion.FORMAT,
)
EVERY = [pytest.param(dialect, id=name) for name, dialect in DIALECTS.items()]

# Calls of one turn as its models write it; what is a name, and what are arguments.
BY_HAND = {
    "toolrl": ('<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>', "f", '{"a": 1}'),
    "hermes": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "f", '{"a": 1}'),
    "llama3_json": ('{"name": "f", "parameters": {"a": 1}}', "f", '{"a": 1}'),
    "qwen3_coder": (
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        "f",
        "<parameter=a>\n1\n</parameter>",
    ),
    "harmony": (
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}',
        "f",
        '{"a": 1}',
    ),
    "glm45": (
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        "f",
        "<arg_key>a</arg_key>\n<arg_value>1</arg_value>",
    ),
    "mistral": ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "f", '{"a": 1}'),
    "mistral_v11": ('[TOOL_CALLS]f[ARGS]{"a": 1}', "f", '{"a": 1}'),
    "deepseek": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        "f",
        '{"a": 1}',
    ),
    "deepseek_v31": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "f",
        '{"a": 1}',
    ),
    "pythonic": ("[f(a=1)]", "f", "(a=1)"),
}


def painted(text: str, region: TokenRegion, dialect: Dialect, **kwargs: Any) -> str:
    raw = text.encode()
    ids = label_regions([raw[i : i + 1] for i in range(len(raw))], dialect=dialect, **kwargs)
    return bytes(b for b, r in zip(raw, ids, strict=True) if r == region).decode()


def written(dialect: Dialect) -> list[tuple[str, tuple[tuple[str, dict[str, Any]], ...], str | None]]:
    turns = []
    for calls in CALLS:
        calls = calls[:1] if dialect.one_call_a_turn else calls
        turns += [(dialect.write(calls, thought=thought), calls, thought) for thought in (None, "hm, {x}")]
    return turns


def test_the_table_is_that_of_the_configuration() -> None:
    assert tuple(DIALECTS) == DIALECT_NAMES and set(BY_HAND) == set(DIALECTS)


@pytest.mark.parametrize("dialect", EVERY)
def test_written_by_hand_byte_by_byte(dialect: Dialect) -> None:
    text, name, arguments = BY_HAND[dialect.name]
    assert dialect.write([("f", {"a": 1})]) == text
    for end in ("", dialect.end_markers[0].decode()):
        assert painted(text + end, NAME, dialect) == name
        assert painted(text + end, ARGS, dialect) == arguments
        rest = (text + end).replace(arguments, "", 1)
        at = rest.rindex("f") if dialect.name != "harmony" else rest.index("functions.f") + len("functions.")
        at = {"hermes": rest.index('"f"') + 1 if '"f"' in rest else at}.get("hermes", at)
        assert sorted(painted(text + end, FORMAT, dialect)) == sorted(rest[:at] + rest[at + 1 :])
        [call] = read_turn(text + end, dialect=dialect).calls
        assert (call.name, call.parameters) == ("f", {"a": 1})


@pytest.mark.parametrize("dialect", EVERY)
def test_written_turns_are_read_back(dialect: Dialect) -> None:
    for text, calls, thought in written(dialect):
        turn = read_turn(text, dialect=dialect, schemas=SCHEMAS)
        assert not turn.errors and turn.is_closed and turn.has_calls
        assert [(call.name, call.parameters) for call in turn.calls] == list(calls)
        assert turn.thought == thought and turn.is_thought_closed == (thought is not None)
        assert painted(text, NAME, dialect) == "".join(name for name, _ in calls)
        if thought is not None:
            assert painted(text, THINK, dialect).strip() == thought


@pytest.mark.parametrize("dialect", EVERY)
def test_text_for_the_user(dialect: Dialect) -> None:
    text = dialect.write([], thought="t", response="Fertig ✅ {x}")
    turn = read_turn(text, dialect=dialect)
    assert (turn.response, turn.calls, turn.has_calls) == ("Fertig ✅ {x}", (), False)
    assert painted(text, RESPONSE, dialect).strip() == "Fertig ✅ {x}"


@pytest.mark.parametrize("dialect", EVERY)
def test_the_prompt_may_have_opened_the_thought(dialect: Dialect) -> None:
    assert dialect.thought is not None and dialect.thought.close is not None
    opening, closing = dialect.thought.open, dialect.thought.close.decode()
    prefix = answer_prefix(b"header" + opening + b"\n", dialect)
    assert prefix == opening.decode() + "\n" and is_thought_open(prefix, dialect)
    empty = answer_prefix(b"header" + opening + b"\n\n" + closing.encode() + b"\n\n", dialect)
    assert empty == f"{opening.decode()}\n\n{closing}\n\n" and not is_thought_open(empty, dialect)
    assert answer_prefix(b"header" + closing.encode(), dialect) == f"{opening.decode()}{closing}"  # as DeepSeek-V3.1's
    assert answer_prefix(b"header", dialect) == ""
    calls = dialect.write([("f", {"a": 1})])
    text = f"hm{closing}{calls}"
    turn = read_turn(text, dialect=dialect, starts_in_think=True)
    assert (turn.thought, [call.name for call in turn.calls]) == ("hm", ["f"])
    assert painted(text, THINK, dialect, starts_in_think=True) == "hm"
    assert read_turn("on and on", dialect=dialect, starts_in_think=True).is_thought_closed is False


@pytest.mark.parametrize("num_cases", [300, pytest.param(1500, marks=pytest.mark.extended)])
@pytest.mark.parametrize("dialect", EVERY)
def test_broken_turns_are_errors_or_text_and_every_byte_has_a_region(dialect: Dialect, num_cases: int) -> None:
    """Cut, spliced and shuffled turns, seeded: reading never raises, and finds names only where regions have them."""
    chance = random.Random(dialect.name)
    whole = [text.encode() for text, _, _ in written(dialect)]
    tags = [tag.encode() for tag in dialect.tags()] + [t.encode() for t in dialect.control_tokens]
    pieces = [
        *tags,
        *dialect.end_markers,
        b"{",
        b"}",
        b'"',
        b"(",
        b")",
        b"[",
        b"]",
        b"=",
        b"\n",
        b"x",
        b"\xff",
        b",",
        b"\\",
    ]
    for _ in range(num_cases):
        raw = chance.choice(whole)
        for _ in range(chance.randrange(1, 4)):
            at, to = sorted((chance.randrange(len(raw) + 1), chance.randrange(len(raw) + 1)))
            raw = raw[:at] + chance.choice([b"", chance.choice(pieces), raw[at:to] * 2]) + raw[to:]
        text = raw.decode("utf-8", "replace")
        turn = read_turn(text, dialect=dialect, starts_in_think=chance.random() < 0.3)
        assert all(isinstance(call.parameters, dict) for call in turn.calls)
        assert label_regions([raw[i : i + 1] for i in range(len(raw))], dialect=dialect).all()
        names = painted(text, NAME, dialect)
        for call in read_turn(text, dialect=dialect).calls:
            if isinstance(call.name, str) and call.name.isascii() and '"' not in call.name and "\\" not in call.name:
                assert call.name in names, text


@pytest.mark.parametrize("dialect", EVERY)
def test_hostile_calls_end_quickly_as_errors(dialect: Dialect) -> None:
    for value in ("[" * 50_000, '{"a":' * 5_000, "9" * 5_000, "(" * 50_000, '"' + "\\" * 50_001, "x" * 100_000):
        text = dialect.write([("f", {"a": "VALUE"})]).replace('"VALUE"', value).replace("VALUE", value)
        turn = read_turn(text, dialect=dialect)
        assert turn.errors or all(len(str(call.parameters)) < 101_000 for call in turn.calls)
    many = "".join(dialect.write([("f", {})]) for _ in range(70))
    assert len(read_turn(many, dialect=dialect).calls) <= 64


def test_one_block_a_call_and_several_calls_a_block_are_read_alike() -> None:
    a, b = '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "parameters": {}}'
    forms = (
        f"<tool_call>{a}</tool_call>\n<tool_call>{b}</tool_call>",
        f"<tool_call>\n{a}\n{b}\n</tool_call>",
        f"<tool_call>[{a}, {b}]</tool_call>",
        f"<tool_call>{a}\u2028\n\n{b}</tool_call>",
    )
    for name in ("toolrl", "hermes"):
        for form in forms:
            assert [c.name for c in read_turn(form, dialect=DIALECTS[name]).calls] == ["f", "g"], form


def test_values_without_types_follow_the_schema() -> None:
    for name in ("qwen3_coder", "glm45"):
        dialect = DIALECTS[name]
        text = dialect.write([("f", {"zip": "12345", "n": 3, "t": True})])
        [guessed] = read_turn(text, dialect=dialect).calls
        [told] = read_turn(text, dialect=dialect, schemas={"f": {"zip": {"type": "string"}}}).calls
        assert guessed.parameters == {"zip": 12345, "n": 3, "t": True}
        assert told.parameters == {"zip": "12345", "n": 3, "t": True}
        [jinja] = read_turn(text.replace("true", "True"), dialect=dialect).calls  # what Jinja's string filter writes
        assert jinja.parameters["t"] is True


def test_python_calls_are_read_and_never_evaluated() -> None:
    dialect = DIALECTS["pythonic"]
    good = read_turn("[a.b(x='it\\'s', y=[1, (2,)], z={'k': None}), f()]", dialect=dialect)
    assert [(c.name, c.parameters) for c in good.calls] == [
        ("a.b", {"x": "it's", "y": [1, [2]], "z": {"k": None}}),
        ("f", {}),
    ]
    for text in ("[f(__import__('os'))]", "[f(x=open('y'))]", "[f(x=1+1)]", "[f(*x)]", "[f(x=f'{y}')]", "[f(x=1"):
        turn = read_turn(text, dialect=dialect)
        assert turn.errors and not turn.calls, text
    assert read_turn("I would call [f(x=1)]", dialect=dialect).response is not None


def test_harmony_by_its_own_rules() -> None:
    dialect = DIALECTS["harmony"]
    text = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
    before = ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
    for spelled in (text, before, "<|start|>assistant" + before):
        [call] = read_turn(spelled, dialect=dialect).calls
        assert (call.name, call.parameters) == ("f", {"a": 1})
        assert painted(spelled, NAME, dialect) == "f" and painted(spelled, ARGS, dialect) == '{"a": 1}'
    assert read_turn(text.replace("functions.f", "python"), dialect=dialect).errors
    plain = read_turn("just text", dialect=dialect)
    assert plain.response == "just text" and not plain.has_calls
    with pytest.raises(ToolCallError, match="ends a turn at its first call"):
        dialect.write([("f", {}), ("g", {})])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ m.content }}", None),
        ("<tool_call>\\n{'name': <function-name>, 'arguments': <args>}</tool_call>", "hermes"),
        ("<tool_call>\\n<function=f>\\n<parameter=p>", "qwen3_coder"),
        ("<tool_call>{name}\\n<arg_key>k</arg_key>\\n<arg_value>", "glm45"),
        ("<|start|>assistant<|channel|>final<|message|>", "harmony"),
        ("[TOOL_CALLS] [", "mistral"),
        ("[TOOL_CALLS]name[ARGS]", "mistral_v11"),
        ("<｜tool▁calls▁begin｜>\\n```json\\n", "deepseek"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek_v31"),
        ("<|start_header_id|> Respond in the format {'name': f, 'parameters': {}}", "llama3_json"),
        ("<|start_header_id|> [func_name1(params_name1=params_value1)]", "pythonic"),
    ],
)
def test_templates_tell_the_dialect(template: str, name: str | None) -> None:
    found = dialects_named_in(template)
    assert (found[0].name if found else None) == name


def test_a_dialect_of_ones_own_is_one_value() -> None:
    own = replace(DIALECTS["hermes"], name="own", end_markers=(b"</s>",))
    assert read_turn('<tool_call>{"name": "f", "arguments": {}}</tool_call></s>x', dialect=own).calls[0].name == "f"


def test_an_object_where_calls_are_written_otherwise_is_named() -> None:
    """Hermes' form, read as Qwen3-Coder's: the answer of a model whose parser was mistaken."""
    turn = read_turn('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', dialect=DIALECTS["qwen3_coder"])
    assert not turn.calls and "is an object, which is not how qwen3_coder writes calls" in turn.errors[0]
