"""API-Bank: the counts of its README; strict and soft scores on hand-made answers; every reference answers itself."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from megatron_rest.eval import api_bank

REFERENCE = {"name": "ModifyRegistration", "parameters": {"id": "34", "date": "2023-03-26"}}


def tagged(*lines: object) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return "\n".join(["<think> a thought about <tool_call> </think>", "<tool_call>", *texts, "</tool_call>"])


def changed(**parameters: object) -> dict[str, object]:
    return {**REFERENCE, "parameters": {**REFERENCE["parameters"], **parameters}}


def test_counts_of_the_published_files():
    cases = api_bank.load()
    assert Counter(case.category for case in cases) == {"level-1": 399, "level-2": 67, "level-3": 131}
    assert len({case.case_id for case in cases}) == 597


def test_every_reference_is_right_in_both_scores_and_wrong_under_another_name():
    for case in api_bank.load():
        reference = case.score.keywords["reference"]
        right = case.score(tagged(reference) + "<|im_end|>")
        assert right.is_correct
        assert right.is_soft_correct
        wrong = case.score(tagged({**reference, "name": reference["name"] + "s"}))
        assert (wrong.outcome, wrong.is_soft_correct) == ("wrong name", False)


@pytest.mark.parametrize(
    ("answer", "outcome", "soft"),
    [
        (tagged(REFERENCE), "correct", True),
        (tagged(REFERENCE, REFERENCE), "several calls", True),
        (tagged(changed(id="35"), REFERENCE), "several calls", True),
        (tagged(REFERENCE["parameters"]), "unreadable call", True),  # the name is given away
        (tagged(changed(id="35")), "wrong value", False),
        (tagged(changed(id=34)), "wrong value", False),  # a number is not a text
        (tagged(changed(note="x")), "extra argument", False),
        (tagged({**REFERENCE, "parameters": {"id": "34"}}), "missing argument", False),
        (tagged("{not json"), "unreadable call", False),
        (tagged("{not json", REFERENCE), "unreadable call", True),
        (tagged("[" * 10_000), "unreadable call", False),
        ("<think> x </think>\n<response> hello </response>", "no call", False),
        ("<think> never closed <tool_call>\n" + json.dumps(REFERENCE) + "\n</tool_call>", "no call", False),
        ("", "no call", False),
    ],
)
def test_scores(answer, outcome, soft):
    score = api_bank.score(answer, reference=REFERENCE)
    assert (score.outcome, score.is_soft_correct) == (outcome, soft)
    assert score.is_correct == (outcome == "correct")


def test_a_truth_value_is_not_a_number():
    reference = {"name": "f", "parameters": {"n": 1}}
    assert (
        api_bank.score(tagged({"name": "f", "parameters": {"n": True}}), reference=reference).outcome == "wrong value"
    )


def test_unknown_levels_and_broken_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="level-4"):
        api_bank.load(categories=("level-4",))
    (tmp_path / "level-1-api_processed.json").write_text(json.dumps([{"system": "s", "user": "u", "answer": []}]))
    with pytest.raises(ValueError, match="row 0"):
        api_bank.load(tmp_path, categories=("level-1",))
