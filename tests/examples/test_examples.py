"""Every example runs as its docstring says, alone and on several gloo ranks, and learns what it claims to learn."""

from __future__ import annotations

import os
import re

import pytest

from tests.helpers.forked import run_module


def run(name: str, *arguments: str, ranks: int = 0) -> str:
    """What an example prints; its standard error in the failure message."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    done = run_module(f"examples.{name}", *arguments, ranks=ranks, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rewards(text: str) -> tuple[float, float]:
    """First and last mean reward."""
    found = re.search(r"mean reward ([\d.]+) -> ([\d.]+)", text)
    assert found, text
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_ops_only_gives_the_same_run_on_one_and_two_ranks():
    alone = run("ops_only")
    first, last = rewards(alone)
    assert last > first + 0.5
    assert run("ops_only", ranks=2) == alone


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [pytest.param((), 0, marks=pytest.mark.extended), (("--tensor-parallel", "2"), 2)],
    ids=["one", "tp2"],
)
@pytest.mark.slow
def test_megatron_loop_learns(arguments, ranks):
    first, last = rewards(run("megatron_loop", *arguments, ranks=ranks))
    assert last > first + 0.3


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [pytest.param((), 0, marks=pytest.mark.extended), (("--pipeline-parallel", "2"), 2)],
    ids=["one", "pp2"],
)
def test_pretrain_forward_step_moves_answers_by_their_advantage(arguments, ranks):
    text = run("pretrain_forward_step", *arguments, ranks=ranks)
    rows = re.findall(r"advantage ([-+][\d.]+)  log-prob a token (-[\d.]+) -> (-[\d.]+)", text)
    assert len(rows) == 4, text
    moves = [(float(advantage), float(after) - float(before)) for advantage, before, after in rows]
    best, worst = max(moves), min(moves)
    assert best[1] > 1.0, text
    assert worst[1] < -1.0, text


def test_own_credit_blames_the_calls_of_a_failure():
    rows = [line.split() for line in run("own_credit").splitlines()[1:]]
    pulls = [(row[-4], float(row[-3]), float(row[-1])) for row in rows]
    success, failure = [p for p in pulls if p[1] > 0], [p for p in pulls if p[1] < 0]
    assert {own for _, _, own in success} == {1.0}
    calls = [own for region, _, own in failure if region in ("tool_name", "tool_args")]
    others = [own for region, _, own in failure if region not in ("tool_name", "tool_args")]
    assert max(calls) < 2 * min(others) < 0, "three times the weight"
    assert abs(sum(calls) + sum(others) + len(failure)) < 0.02, "mean 1"
