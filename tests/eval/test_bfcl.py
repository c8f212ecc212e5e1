"""BFCL's single-turn categories: our way into the official checker changes none of its verdicts.

1. the accepted answers of every case are right, but for the contradictions of BFCL itself, named here
2. 1,000 mutated answers get the official checker's own verdict and kind of error
3. irrelevance and relevance; hostile answers are data
4. tools are shown as the leaderboard shows them
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_rest.eval import bfcl

PYTHON_CATEGORIES = tuple(c for c in bfcl.AST_CATEGORIES if c not in ("simple_java", "simple_javascript"))
# Cases that no answer satisfies in BFCL's own checker: an empty list of accepted values, a value for a parameter that
# the function does not have, a required parameter that the accepted answer leaves out.
CONTRADICTIONS = {
    "live_multiple_862-181-3",
    "live_multiple_964-207-0",
    "live_simple_106-63-0",
    "live_simple_112-68-0",
}


def accepted(possible: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls with an accepted value of every parameter; one that may be left out (accepted: "") is, unless required."""
    required = {f["name"]: f["parameters"].get("required", []) for f in entry["function"]}
    return [
        {"name": name, "parameters": values(options, required.get(name, ()))}
        for call in possible
        for name, options in call.items()
    ]


def values(options_of: dict[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    found = {}
    for name, options in options_of.items():
        if not isinstance(options, list):
            found[name] = options
        elif name in required or "" not in options:
            found[name] = concrete(next((option for option in options if option != ""), ""))
    return found


def concrete(option: Any) -> Any:
    if isinstance(option, dict):
        return values(option)
    if isinstance(option, list):
        return [values(part) if isinstance(part, dict) else part for part in option]
    return option


def tagged(calls: list[Any]) -> str:
    return "\n".join(["<think> t </think>", "<tool_call>", *map(json.dumps, calls), "</tool_call>"])


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    return [
        (category, entry, possible[entry["id"]])
        for category in PYTHON_CATEGORIES
        for possible in [bfcl.load_possible_answers(category)]
        for entry in bfcl.load_entries(category)
    ]


def test_accepted_answers_are_right(cases):
    assert len(cases) == 2351
    wrong = set()
    for category, entry, possible in cases:
        answer = tagged(accepted(possible, entry))
        if not bfcl.score(answer, category=category, entry=entry, possible=possible).is_correct:
            wrong.add(entry["id"])
    assert wrong == CONTRADICTIONS


def test_java_and_javascript_values_are_written_as_strings():
    for category, text in (("simple_java", "true"), ("simple_javascript", "true")):
        possible = bfcl.load_possible_answers(category)
        scored = 0
        for entry in bfcl.load_entries(category):
            (call,) = accepted(possible[entry["id"]], entry)
            if any(not isinstance(value, (str, bool)) for value in call["parameters"].values()):
                continue  # lists and numbers have several spellings
            call["parameters"] = {
                name: value if isinstance(value, str) else text if value else "false"
                for name, value in call["parameters"].items()
            }
            score = bfcl.score(tagged([call]), category=category, entry=entry, possible=possible[entry["id"]])
            scored += score.is_correct
        assert scored >= 10, category


def mutate(calls: list[dict[str, Any]], generator: random.Random) -> list[dict[str, Any]]:
    calls = json.loads(json.dumps(calls))
    call = generator.choice(calls)
    names = list(call["parameters"])
    kind = generator.choice(["name", "drop call", "double", "swap", "new", "drop", "value", "type", "nest"])
    if kind == "name":
        call["name"] += generator.choice(["s", ".x", "_"])
    elif kind == "drop call":
        calls.remove(call)
    elif kind == "double":
        calls.append(call)
    elif kind == "swap":
        generator.shuffle(calls)
    elif kind == "new" or not names:
        call["parameters"]["surplus"] = 1
    elif kind == "drop":
        del call["parameters"][generator.choice(names)]
    else:
        wrong = {"value": ["ünknown", -17, 3.25, ""], "type": [None, True, [], {}], "nest": [[[1]], {"a": {"b": []}}]}
        call["parameters"][generator.choice(names)] = generator.choice(wrong[kind])
    return calls


def test_mutated_answers_get_the_official_verdict(cases):
    checker, languages = bfcl._official_checker()
    generator = random.Random(7)
    kinds: Counter[str] = Counter()
    for category, entry, possible in generator.sample(cases, 1000):
        calls = mutate(accepted(possible, entry), generator)
        ours = bfcl.score(tagged(calls), category=category, entry=entry, possible=possible)
        if not calls:
            assert ours.outcome == "no readable call"
            continue
        output = [{call["name"]: call["parameters"]} for call in calls]
        try:
            verdict = checker(entry["function"], output, possible, languages.PYTHON, category, "any")
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            assert ours.outcome == "checker gave up"
        else:
            assert ours.is_correct == verdict["valid"]
            assert verdict["valid"] or ours.outcome == verdict["error_type"]
        kinds[ours.outcome] += 1
    assert kinds["correct"] > 50, "swapped parallel calls and dropped optional parameters stay right"
    assert len(kinds) > 8, kinds


@pytest.mark.parametrize(
    ("category", "answer", "is_correct"),
    [
        ("irrelevance", "<think> x </think> <response> I cannot do that </response>", True),
        ("irrelevance", tagged([{"name": "f", "parameters": {}}]), False),
        ("live_irrelevance", "<tool_call>\nbroken\n</tool_call>", True),  # the leaderboard reads no call in it either
        ("live_relevance", tagged([{"name": "f", "parameters": {}}]), True),
        ("live_relevance", "no", False),
    ],
)
def test_calls_where_none_fits_and_any_fits(category, answer, is_correct):
    assert bfcl.score(answer, category=category, entry=bfcl.load_entries(category)[0]).is_correct == is_correct


@pytest.mark.parametrize(
    "value",
    [
        "__import__('os').system('touch owned')",
        "'); open('owned','w'); ('",
        {"$eval": "1"},
        [[[[[[]]]]]],
        10**400,
        "\x00",
    ],
)
def test_hostile_values_are_data(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for category in ("simple_python", "simple_java", "simple_javascript", "parallel"):
        entry = bfcl.load_entries(category)[0]
        possible = bfcl.load_possible_answers(category)[entry["id"]]
        (first, *rest) = accepted(possible, entry)
        first["parameters"] = dict.fromkeys(first["parameters"], value)
        score = bfcl.score(tagged([first, *rest]), category=category, entry=entry, possible=possible)
        assert not score.is_correct
    assert list(tmp_path.iterdir()) == []


def test_cases_show_every_tool_and_the_question():
    cases = {case.case_id: case for case in bfcl.load(bfcl.SINGLE_TURN)}
    assert len(cases) == 3641
    entry = next(e for e in bfcl.load_entries("live_multiple") if len(e["function"]) > 3)
    system, user = cases[entry["id"]].messages
    assert all(f"Name: {function['name']}\n" in system["content"] for function in entry["function"])
    asked = [m["content"] for m in entry["question"][0] if m["role"] == "user"]
    assert all(text in user["content"] for text in asked)
    java = cases["simple_java_22"].messages[0]["content"]
    assert "A Java ArrayList of long, written as a string." in java
    assert 'ArrayList"' not in java, "its type is string"


def test_importing_the_checker_leaves_no_stand_in_behind():
    import sys

    bfcl._official_checker()
    assert "bfcl_eval.constants.model_config" not in sys.modules
    assert "bfcl_eval.utils" not in sys.modules, "it creates folders beside the installed package"


def test_unknown_category():
    with pytest.raises(ValueError, match=r"no category multi_turn_composite; it has .*multi_turn_base"):
        bfcl.load(("multi_turn_composite",))
