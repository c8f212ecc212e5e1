"""Every example runs as its docstring says, alone and on several gloo ranks, and learns what it claims to learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, ranks: int = 1) -> str:
    """What an example prints; its standard error in the failure message."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, "-W", "ignore", *launcher, str(EXAMPLES / name), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rewards(text: str) -> tuple[float, float]:
    """First and last mean reward."""
    found = re.search(r"mean reward ([\d.]+) -> ([\d.]+)", text)
    assert found, text
    return float(found[1]), float(found[2])


def test_ops_only_gives_the_same_run_on_one_and_two_ranks():
    alone = run("ops_only.py")
    first, last = rewards(alone)
    assert last > first + 0.5
    assert run("ops_only.py", ranks=2) == alone


@pytest.mark.parametrize(("arguments", "ranks"), [((), 1), (("--tensor-parallel", "2"), 2)], ids=["one", "tp2"])
def test_megatron_loop_learns(arguments, ranks):
    first, last = rewards(run("megatron_loop.py", *arguments, ranks=ranks))
    assert last > first + 0.3


@pytest.mark.parametrize(("arguments", "ranks"), [((), 1), (("--pipeline-parallel", "2"), 2)], ids=["one", "pp2"])
def test_pretrain_forward_step_moves_answers_by_their_advantage(arguments, ranks):
    text = run("pretrain_forward_step.py", *arguments, ranks=ranks)
    rows = re.findall(r"advantage ([-+][\d.]+)  log-prob a token (-[\d.]+) -> (-[\d.]+)", text)
    assert len(rows) == 4, text
    moves = [(float(advantage), float(after) - float(before)) for advantage, before, after in rows]
    best, worst = max(moves), min(moves)
    assert best[1] > 1.0, text
    assert worst[1] < -1.0, text
