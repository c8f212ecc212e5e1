"""Hostile and odd calls are refused before anything runs; honest ones give what BFCL's own executor gives."""

from __future__ import annotations

import copy
import json
from importlib.resources import files

import pytest

from megatron_rest.rollout.environments.bfcl import CATEGORIES, bfcl_objects, bfcl_rows
from megatron_rest.rollout.environments.calls import Call, parse_calls
from megatron_rest.rollout.environments.executor import CallRefusedError, LiteralCall, LiteralExecutor, parse_call

RAN: list[str] = []


class Tool:
    """Public, private and special things that a call might reach for."""

    secret = "s"

    def __init__(self) -> None:
        self.state = 0
        self.hook = lambda *_: RAN.append("hook")

    def add(self, amount: int, note: str = "") -> dict[str, int]:
        RAN.append("add")
        self.state += amount
        return {"state": self.state}

    def fail(self) -> None:
        raise KeyError("nothing there")

    def _load(self) -> None:
        RAN.append("_load")


HOSTILE = [
    "__import__('os').system('true')",
    "add(amount=__import__('os').getpid())",
    "add(amount=str(__import__('os').listdir('/')))",
    "add(amount=(lambda: 1)())",
    "add(amount=[x for x in (1, 2)][0])",
    "add(amount=f'{1}')",
    "add(amount=1 + 1)",
    "add(amount=2 ** 2)",
    "add(amount=9**9**9)",
    "add(amount=-(-1))",
    "add(amount=1j)",
    "add(amount=b'x')",
    "add(amount={1, 2})",
    "add(amount=...)",
    "add(amount=1e999)",
    f"add(amount={10**40})",
    "add(*[1])",
    "add(**{'amount': 1})",
    "add(amount=1, amount=2)",
    "add(amount=add(amount=1))",
    "add(amount=state)",
    "add(amount=True if 1 else 2)",
    "add(amount=x) if (x := 1) else 0",
    "add(amount={1: 2})",
    "add(amount={**{}})",
    "_load()",
    "__init__()",
    "__class__()",
    "hook()",
    "secret()",
    "state()",
    "add.__globals__()",
    "tool.add.__call__(amount=1)",
    "add(amount=1).state",
    "add(amount=1); add(amount=1)",
    "add(amount=1)\nadd(amount=1)",
    "(add)(amount=1)(amount=1)",
    "add",
    "add[0](amount=1)",
    "import os",
    "eval('1')",
    "exec('1')",
    "getattr(tool, 'add')(amount=1)",
    "print(1)",
    "",
    "\0",
    "add(amount=" + "[" * 5000 + "]" * 5000 + ")",
    "add(amount=" + "(" * 150 + "1" + ")" * 150 + ",)" + "x",
    "add(amount=" + "[" * 40 + "]" * 40 + ")",
    "add(amount=[" + "1," * 20_000 + "])",
    "add(note='" + "x" * 70_000 + "', amount=1)",
    "add(1, 2, 3)",
    "add(other=1)",
    "add()",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_call_is_refused_and_nothing_runs(text: str) -> None:
    RAN.clear()
    tool = Tool()
    executor = LiteralExecutor({"tool": tool})
    with pytest.raises(CallRefusedError):
        executor.call(parse_call(text))
    assert executor.run(text).startswith("Error during execution: ")
    assert RAN == [] and tool.state == 0


class Hoarder:
    """Doubles what it holds with every call."""

    def __init__(self) -> None:
        self.held: list[object] = [{"text": "x" * 1000}]

    def double(self) -> str:
        self.held = [copy.deepcopy(self.held), self.held]
        return "doubled"

    def loud(self) -> str:
        return "x" * 3_000_000


def test_growing_objects_and_long_results_are_bounded() -> None:
    hoarder = Hoarder()
    executor = LiteralExecutor({"hoarder": hoarder})
    said = [executor.run("double()") for _ in range(100)]
    count = said.count("doubled")
    assert 8 < count < 16 and said[:count] == ["doubled"] * count
    assert set(said[count:]) == {"Error during execution: the objects have grown by more than 8 MB: no further calls"}
    assert len(LiteralExecutor({"hoarder": Hoarder()}).run("loud()")) == 1 << 20


def test_honest_calls_run_and_failures_of_tools_are_told() -> None:
    executor = LiteralExecutor({"tool": Tool()})
    assert executor.names == ["add", "fail"]
    assert executor.run("add(2)") == '{"state": 2}'
    assert executor.run("Tool.add(amount=-1, note='a, (b)')") == '{"state": 1}'
    assert executor.run(LiteralCall(name="add", keywords={"amount": 1})) == '{"state": 2}'
    assert executor.run("fail()") == "Error during execution: 'nothing there'"
    nested: list[object] = []
    for _ in range(100):
        nested = [nested]
    for value in (object(), nested, float("nan"), 2**60, {"k": {1: 2}}, "x" * 70_000, [0] * 20_000):
        with pytest.raises(CallRefusedError):
            executor.call(LiteralCall(name="add", keywords={"amount": value}))


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("no call", []),
        ('<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>', [Call("a", {"x": 1})]),
        ('<tool_call>{"name": "a", "parameters": {}}\n{"name": "b", "parameters": {}}</tool_call>',
         [Call("a", {}), Call("b", {})]),
        ('<think><tool_call>{"name": "a", "arguments": {}}</tool_call></think>done', []),
        ('<tool_call>{"name": "a", "arguments": {}}', [Call("a", {})]),  # cut off behind a whole call
        ('<tool_call>[{"name": "a", "arguments": {}}]</tool_call>', [Call("a", {})]),
    ],
)  # fmt: skip
def test_calls_are_found(text: str, calls: list[Call]) -> None:
    found = parse_calls(text)
    assert list(found.calls) == calls and not found.errors


@pytest.mark.parametrize(
    "block",
    ["", "{", "[]", "1", '{"name": 1, "arguments": {}}', '{"name": "a"}', '{"name": "a", "arguments": [1]}',
     '{"name": "a", "arguments": {"x": NaN}}', "[" * 100_000, '{"a":' * 5_000, "x" * 100_000],
)  # fmt: skip
def test_broken_blocks_are_findings_not_exceptions(block: str) -> None:
    good = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    found = parse_calls(f"<tool_call>{block}</tool_call>{good}")
    assert found.calls == (Call("a", {}),) and len(found.errors) == 1
    assert not parse_calls(good * 65).calls


def test_results_of_all_reference_calls_equal_those_of_bfcls_own_executor() -> None:
    """Same result, text for text, on objects of their own; BFCL's executor is what evaluates its own reference here."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call

    count = 0
    for category in CATEGORIES[:1]:
        answers = {row["id"]: row["ground_truth"] for row in bfcl_rows(category, answers=True)}
        for row in bfcl_rows(category):
            executor = LiteralExecutor(bfcl_objects(row))
            calls = [call for turn in answers[row["id"]] for call in turn]
            theirs, _ = execute_multi_turn_func_call(
                calls, copy.deepcopy(row["initial_config"]), row["involved_classes"], "reference", row["id"]
            )
            assert [executor.run(call) for call in calls] == theirs
            count += len(calls)
    assert count > 1000
    total = 0
    for path in sorted((files("bfcl_eval") / "data" / "possible_answer").iterdir(), key=str):
        if "multi_turn" in path.name:
            lines = map(json.loads, path.read_text().splitlines())
            total += sum(len([parse_call(call) for call in turn]) for line in lines for turn in line["ground_truth"])
    assert total == 4625, "every reference call of BFCL v4's multi-turn categories is a literal call"
