"""BFCL's conversations: our executor in the released checker changes none of its verdicts.

1. the reference of every task is right, told as a model tells it: texts, one or several calls an answer
2. mutated references get the verdict and the kind of error of the untouched checker with its own executor
3. nothing that an answer says is evaluated; unfinished conversations are wrong

``python -m tests.eval.test_bfcl_multi_turn`` compares 5 mutations of each of the 800 tasks; the suite takes 250 in all.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_rest.eval import bfcl_multi_turn as multi_turn
from megatron_rest.eval.cases import EvalCase, Score
from megatron_rest.rollout.environments.base import Answer
from megatron_rest.rollout.environments.bfcl import BfclEnvironment, bfcl_objects
from megatron_rest.rollout.environments.calls import parse_calls
from megatron_rest.rollout.environments.executor import LiteralCall, parse_call

Turns = list[list[list[LiteralCall]]]  # calls by turn of the user and answer
OFFICIAL = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
UTILS = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils")


@cache
def signatures(classes: tuple[str, ...]) -> dict[str, inspect.Signature]:
    """Of every method that a policy may call, without ``self``."""
    objects = bfcl_objects({"id": "x_0", "involved_classes": classes, "initial_config": {}})
    return {
        name: inspect.signature(method)
        for target in objects.values()
        for name, method in inspect.getmembers(target, inspect.ismethod)
    }


def named(case: EvalCase) -> Turns:
    """The reference, a turn in one answer, all arguments named, as JSON has them."""
    known = signatures(tuple(case.score.keywords["row"]["involved_classes"]))
    turns: Turns = []
    for texts in case.score.keywords["reference"]:
        calls = []
        for call in map(parse_call, texts):
            bound = known[call.name].bind(*call.positional, **call.keywords)
            calls.append(LiteralCall(name=call.name, keywords=json.loads(json.dumps(dict(bound.arguments)))))
        turns.append([calls] if calls else [])
    return turns


def told(turns: Turns) -> list[list[str]]:
    """As a model writes it, the closing answer of each turn included."""

    def block(call: LiteralCall) -> str:
        return f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': dict(call.keywords)})}\n</tool_call>"

    blocks = [["\n".join(map(block, answer)) for answer in turn] for turn in turns]
    return [[f"<think>so</think>\n{text}<|im_end|>" for text in turn] + ["Done.<|im_end|>"] for turn in blocks]


def ours(case: EvalCase, turns: Turns) -> Score:
    return case.score(told(turns))


def official(case: EvalCase, turns: Turns) -> dict[str, Any]:
    """The untouched checker and BFCL's executor, on calls that this file made: nothing hostile is in them."""
    row, reference = case.score.keywords["row"], case.score.keywords["reference"]
    texts = [
        [[f"{c.name}({', '.join(f'{k}={v!r}' for k, v in c.keywords.items())})" for c in answer] for answer in turn]
        for turn in turns
    ]
    before = set(vars(UTILS))
    try:
        return OFFICIAL.multi_turn_checker([[a for a in turn if a] for turn in texts], reference, row, "any", "any")
    finally:
        for name in set(vars(UTILS)) - before:  # BFCL keeps a task's objects as globals, for ever
            delattr(UTILS, name)


def split(turns: Turns) -> Turns:
    """A call an answer."""
    return [[[call] for answer in turn for call in answer] for turn in turns]


def mutate(turns: Turns, generator: random.Random) -> Turns:
    """One or two changes of what a policy gets wrong."""
    turns = [[list(answer) for answer in turn] for turn in split(turns)]
    for _ in range(generator.choice([1, 1, 2])):
        filled = [(t, a) for t, turn in enumerate(turns) for a, answer in enumerate(turn) if answer]
        if not filled:
            break
        t, a = generator.choice(filled)
        [call, *_] = turns[t][a]
        names = list(call.keywords)
        kind = generator.choice(["drop", "double", "swap", "early", "late", "name", "value", "surplus", "less", "idle"])
        if kind == "drop":
            turns[t].pop(a)
        elif kind == "double":
            turns[t].insert(a, [call])
        elif kind == "swap":
            generator.shuffle(turns[t])
        elif kind in ("early", "late"):
            turns[max(0, min(len(turns) - 1, t + (1 if kind == "late" else -1)))].append(turns[t].pop(a))
        elif kind == "name":
            turns[t][a] = [LiteralCall(name=call.name + "_", keywords=call.keywords)]
        elif kind == "idle":
            turns[t] = []
        elif kind == "surplus" or not names:
            turns[t][a] = [LiteralCall(name=call.name, keywords={**call.keywords, "surplus": 1})]
        else:
            changed = dict(call.keywords)
            name = generator.choice(names)
            del changed[name]
            if kind == "value":
                changed[name] = generator.choice(["ünknown", "", -17, 3.25, True, None, [], {"a": [1]}, "a'b\"c\n"])
            turns[t][a] = [LiteralCall(name=call.name, keywords=changed)]
    return turns


def compare(cases: list[EvalCase], count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Outcomes of ``count`` mutations of each case, and where the two disagree."""
    generator = random.Random(seed)
    outcomes: Counter[str] = Counter()
    different = []
    for case in cases:
        reference = named(case)
        for _ in range(count):
            turns = mutate(reference, generator)
            theirs, mine = official(case, turns), ours(case, turns)
            if mine.is_correct != theirs["valid"] or not (mine.is_correct or mine.outcome == theirs["error_type"]):
                different.append(f"{case.case_id}: {theirs.get('error_message')} / {mine} / {turns}")
            outcomes[mine.outcome] += 1
    return outcomes, different


@pytest.fixture(scope="module")
def cases() -> list[EvalCase]:
    return [case for category in multi_turn.CATEGORIES for case in multi_turn.load(category)]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.extended)])
def test_every_reference_is_right(cases: list[EvalCase], every: int) -> None:
    assert len(cases) == 800
    wrong = [case.case_id for case in cases[::every] if not ours(case, named(case)).is_correct]
    assert wrong == []
    assert all(ours(case, split(named(case))).is_correct for case in cases[::20])


def test_mutated_references_get_the_official_verdict(cases: list[EvalCase]) -> None:
    outcomes, different = compare(random.Random(3).sample(cases, 250), 1, seed=11)
    assert different == []
    assert set(outcomes) >= {
        "correct",
        "multi_turn:instance_state_mismatch",
        "multi_turn:execution_response_mismatch",
        "multi_turn:empty_turn_model_response",
    }, outcomes
    assert outcomes["correct"] > 30, "a doubled look, another order"


def test_the_environments_reward_is_the_score(cases: list[EvalCase]) -> None:
    """What RL is paid for is what the benchmark counts."""
    generator = random.Random(5)
    rewards: Counter[float] = Counter()
    for case in generator.sample(cases, 60):
        turns = mutate(named(case), generator)
        environment = BfclEnvironment(case.score.keywords["row"], case.score.keywords["reference"])
        environment.reset()
        for text in (text for turn in told(turns) for text in turn):
            observation = environment.step(Answer(text=text, calls=parse_calls(text), turn=0))
        assert observation.done
        reward = environment.reward()
        assert reward == float(case.score(told(turns)).is_correct), case.case_id
        rewards[reward or 0.0] += 1
    assert min(rewards.values()) > 5 and len(rewards) == 2


def test_an_unfinished_conversation_is_wrong(cases: list[EvalCase]) -> None:
    case = cases[0]
    turns = told(named(case))
    assert case.score(turns).is_correct
    assert case.score(turns[:-1]).outcome == "unfinished"
    assert case.score([*turns, ["more"]]).outcome == "unfinished"
    assert case.score([]).outcome == "unfinished"


@pytest.mark.parametrize(
    "text",
    [
        "echo(content=str(__import__('os').listdir('/')))",
        "<tool_call>__import__('pathlib').Path('owned').touch()</tool_call>",
        """<tool_call>{"name": "echo", "arguments": {"content": "'); open('owned', 'w'); ('"}}</tool_call>""",
        "<tool_call>{\"name\": \"__import__('pathlib').Path('owned').touch\", \"arguments\": {}}</tool_call>",
        '<tool_call>{"name": "_load_scenario", "arguments": {"scenario": {}}}</tool_call>',
        '<tool_call>{"name": "__class__", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "echo", "arguments": {"content": {"a": 1e400}}}</tool_call>',
        "<tool_call>" + "[" * 5000 + "</tool_call>",
    ],
)  # fmt: skip
def test_hostile_answers_are_data(
    text: str, cases: list[EvalCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = cases[0]
    hostile = [[text, *turn] for turn in told(named(case))]
    score = case.score(hostile)  # the calls beside it still count, unless it changed the state
    assert score.is_correct or score.outcome == "multi_turn:instance_state_mismatch"
    assert not case.score([[text]] * len(hostile)).is_correct
    assert list(tmp_path.iterdir()) == []


def test_the_package_keeps_its_own_executor() -> None:
    assert multi_turn._checker().execute_multi_turn_func_call is multi_turn._execute
    assert OFFICIAL.execute_multi_turn_func_call is UTILS.execute_multi_turn_func_call
    assert multi_turn._executors == {}


def main() -> int:
    cases = [case for category in multi_turn.CATEGORIES for case in multi_turn.load(category)]
    wrong = [case.case_id for case in cases if not ours(case, named(case)).is_correct]
    outcomes, different = compare(cases, 5, seed=1)
    print(f"references: {len(cases) - len(wrong)} of {len(cases)} right {wrong}")
    print(f"mutations: {outcomes.total() - len(different)} of {outcomes.total()} as the official checker")
    print(dict(outcomes))
    print("\n".join(different[:10]))
    return 1 if wrong or different else 0


if __name__ == "__main__":
    sys.exit(main())
