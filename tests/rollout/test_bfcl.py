"""BFCL's stateful tasks as an environment: the reference solves every task, and not without its calls."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest

from megatron_rest.rollout.environments.base import Answer
from megatron_rest.rollout.environments.bfcl import (
    CATEGORIES,
    BfclEnvironment,
    bfcl_environment,
    bfcl_executor,
    bfcl_messages,
    bfcl_objects,
    bfcl_prompts,
    bfcl_rows,
)
from megatron_rest.rollout.environments.calls import Call, ParsedCalls, parse_calls
from megatron_rest.rollout.environments.executor import LiteralCall, parse_call
from megatron_rest.types import PromptSample


def by_name(row: dict, text: str) -> Call:
    """A reference call with all its arguments named, as a policy writes it."""
    call = parse_call(text)
    for target in bfcl_objects(row).values():
        if method := getattr(target, call.name, None):
            bound = inspect.signature(method).bind(*call.positional, **call.keywords)
            return Call(call.name, json.loads(json.dumps(dict(bound.arguments))))
    raise AssertionError(f"no object of {row['id']} has {call.name}")


def play(row: dict, reference: list[list[str]], played: list[list[str]], *, step: int = 2) -> tuple[float | None, int]:
    """Play ``played`` against the environment, ``step`` calls an answer; reward and messages seen."""
    environment = BfclEnvironment(row, reference)
    environment.reset()
    turn, seen, is_done = 0, 0, False
    for calls in played:
        named = [by_name(row, text) for text in calls]
        answers = [ParsedCalls(tuple(named[i : i + step])) for i in range(0, len(named), step)]
        for parsed in [*answers, ParsedCalls()]:
            observation = environment.step(Answer(text="", calls=parsed, turn=turn))
            seen += len(observation.messages)
            assert len(observation.messages) == len(parsed.calls) or not parsed.calls
            is_done, turn = observation.done, turn + 1
    assert is_done
    reward = environment.reward()
    environment.close()
    return reward, seen


@pytest.mark.parametrize("category", CATEGORIES)
def test_reference_is_rewarded_and_idleness_is_not(category: str) -> None:
    rows = bfcl_rows(category)
    answers = {row["id"]: row["ground_truth"] for row in bfcl_rows(category, answers=True)}
    assert len(rows) == 200
    for row in rows if category == CATEGORIES[0] else rows[::10]:
        reference = answers[row["id"]]
        assert play(row, reference, reference)[0] == 1.0, row["id"]
        assert play(row, reference, [[] for _ in reference])[0] == 0.0, row["id"]
        spoiled = [list(turn) for turn in reference]
        next(turn for turn in spoiled if turn).pop()
        assert play(row, reference, spoiled)[0] == 0.0, row["id"]


def test_errors_are_told_and_the_conversation_goes_on() -> None:
    environment = bfcl_environment(PromptSample(prompt_id="p", token_ids=np.zeros(1, np.int32),
                                                ground_truth='{"bfcl": "multi_turn_base_0"}'))  # fmt: skip
    environment.reset()
    texts = [
        '<tool_call>{"name": "cd", "arguments": {"folder": "nowhere"}}</tool_call>',
        '<tool_call>{"name": "GorillaFileSystem.ls", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "_load_scenario", "arguments": {"scenario": {}}}</tool_call>',
        '<tool_call>{"name": "cd", "arguments": {"folder": 1, "x": 2}}</tool_call>',
        "<tool_call>{</tool_call>",
    ]
    said = []
    for turn, text in enumerate(texts):
        [message] = environment.step(Answer(text=text, calls=parse_calls(text), turn=turn)).messages
        assert message.role == "tool"
        said.append(message.content)
    assert "no such directory" in said[0].lower() or "error" in said[0].lower()
    assert "document" in said[1]
    assert all(s.startswith("Error during execution: ") for s in said[2:])
    assert "no tool named" in said[2]
    [following] = environment.step(Answer(text="done", calls=ParsedCalls(), turn=9)).messages
    assert following.role == "user" and "grep" in following.content
    for turn in range(21):
        last = environment.step(Answer(text="", calls=parse_calls(texts[1]), turn=turn))
    assert last.done and environment.reward() == 0.0, "twenty answers with calls, as BFCL allows"


def test_functions_held_out_come_with_their_turn() -> None:
    row = bfcl_rows("multi_turn_miss_func")[0]
    assert row["missed_function"] == {"3": ["sort"]}
    [system, _] = bfcl_messages(row)
    assert '"name": "sort"' not in system["content"] and '"name": "grep"' in system["content"]
    environment = BfclEnvironment(row, [[] for _ in row["question"]])
    environment.reset()
    said = [environment.step(Answer(text="no", calls=ParsedCalls(), turn=turn)).messages for turn in range(4)]
    [brought] = said[2]
    assert brought.role == "user" and '"name": "sort"' in brought.content
    assert brought.content.endswith("I have updated some more functions you can choose from. What about now?")
    assert all('"name": "sort"' not in message.content for messages in said[:2] for message in messages)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("power", {"base": 10, "exponent": 10**8}),
        ("MathAPI.power", {"base": 10, "exponent": 10**8}),
        ("logarithm", {"value": 2, "base": 3, "precision": 10**9}),
        ("logarithm", {"value": 2, "base": 3, "precision": "1000000000"}),
        ("square_root", {"number": 2, "precision": 10**9}),
        ("round_number", {"number": 5, "decimal_places": -(10**9)}),
    ],
)
def test_no_call_keeps_a_core_busy(name: str, arguments: dict) -> None:
    executor = bfcl_executor(bfcl_objects({"id": "x_0", "involved_classes": ["MathAPI"], "initial_config": {}}))
    call = LiteralCall(name=name.rpartition(".")[2], keywords=arguments)
    assert executor.run(call).endswith("is a number and may be at most 1000")
    text = json.dumps({"name": name, "arguments": arguments})
    row = next(row for row in bfcl_rows(CATEGORIES[0]) if "MathAPI" in row["involved_classes"])
    environment = BfclEnvironment(row, [[] for _ in row["question"]])
    environment.reset()
    [said] = environment.step(Answer(text=text, calls=parse_calls(f"<tool_call>{text}</tool_call>"), turn=0)).messages
    assert said.content.endswith("is a number and may be at most 1000")


def test_prompts_carry_tools_and_task() -> None:
    class Plain:
        """A tokenizer with a letter a token (the environment needs no more of it)."""

        def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
            assert add_generation_prompt and not tokenize
            return "\n".join(f"{m['role']}: {m['content']}" for m in messages)

        def __call__(self, text, *, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [ord(c) for c in text]}

    prompts = bfcl_prompts(Plain())
    text = "".join(map(chr, prompts[0].token_ids))
    assert '"name": "mkdir"' in text and "Move 'final_report.pdf'" in text
    assert isinstance(bfcl_environment(prompts[0]), BfclEnvironment)
    for wrong in ("", "{}", '{"bfcl": 3}', '{"bfcl": "multi_turn_base_999"}', '{"bfcl": "../../x_1"}'):
        with pytest.raises(ValueError, match="is no BFCL task"):
            bfcl_environment(PromptSample(prompt_id="p", token_ids=np.zeros(1, np.int32), ground_truth=wrong))
