"""Our reward and the published one give the same numbers on edited real answers, except where we differ on purpose."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.reference_code import compute_score
from megatron_rest.config import RewardConfig
from megatron_rest.rewards import tool_call_reward
from tests.regions.samples import sample_answers
from tests.rewards.cases import CASES, STEPS

PUBLISHED = RewardConfig(accept_arguments=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kept_copy_gives_the_golden_totals(case) -> None:  # type: ignore[no-untyped-def]
    for step, expected in zip(STEPS, case.dynamic, strict=True):
        assert compute_score(case.answer, case.reference, step=step)[0] == pytest.approx(expected, abs=5e-5)
    static = compute_score(case.answer, case.reference, step=0, schedule=False)
    assert static[1:] == pytest.approx(case.static, abs=1e-6)


def edited(answer: str, rng: random.Random) -> str:
    """One of the mistakes a policy makes."""
    lines = answer.split("\n")
    kind = rng.randrange(8)
    if kind == 0:
        return answer[: rng.randrange(len(answer))]
    if kind == 1:
        del lines[rng.randrange(len(lines))]
    elif kind == 2:
        rng.shuffle(lines)
    elif kind == 3:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    elif kind == 4:
        start = rng.randrange(len(answer))
        return answer[:start] + rng.choice('"{}<>x1 ') + answer[start + 1 :]
    elif kind == 5:
        return answer.replace("<tool_call>", "<response>") if rng.random() < 0.5 else answer + "<response>x</response>"
    else:
        lines = [_edited_call(line, rng) for line in lines]
    return "\n".join(lines)


def _edited_call(line: str, rng: random.Random) -> str:
    try:
        call = json.loads(line)
        parameters = call["parameters"]
        key = rng.choice(sorted(parameters))
    except (ValueError, KeyError, IndexError, TypeError):
        return line
    edit = rng.randrange(4)
    if edit == 0:
        parameters[key] = str(parameters[key]) + "!"
    elif edit == 1:
        del parameters[key]
    elif edit == 2:
        parameters["extra"] = True
    else:
        call["name"] += "x"
    return json.dumps(call)


def test_on_edited_answers() -> None:
    rng = random.Random(7)
    answers = [answer for answer in sample_answers() if "<tool_call>" not in answer.partition("</think>")[0]]
    different = 0
    for _ in range(4000):
        reference = rng.choice(answers)
        answer, step = edited(reference, rng), rng.randrange(200)
        ours = tool_call_reward(answer, reference, step=step, config=PUBLISHED)
        theirs = compute_score(answer, reference, step=step)
        assert (ours.format, ours.correctness) == pytest.approx(theirs[1:], abs=1e-9), (answer, reference)
        different += answer != reference
    assert different > 3000
