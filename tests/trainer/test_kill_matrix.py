"""Who is killed, and when: every cell survives, or ends cleanly and continues; nothing is left, nothing is different.

    who         a rank, the launcher; the engine's process, or a vLLM worker under it (where engines are processes)
    when        while rollouts are sampled, weights are transferred, the policy is updated, a checkpoint is saved
    engines     inside the ranks (transport local) or in a process of their own (gloo), tensor parallelism 1 and 2

One run goes through all losses of its engine, another one is ended by all who can end it, each time followed by the
next start.  After every end there is no process, no listening port, no temporary folder and no file in /dev/shm of it;
at the end it equals a run that was left alone, bit for bit.  Over NCCL nothing can be killed without GPUs:
tests/weight_sync/test_links.py scripts what its links do then.

The launcher is torchrun's agent, which forks ranks that have their imports; engines are what they always are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from benchmarks import chaos, chaos_rank
from benchmarks.chaos_rank import PHASES, Life
from megatron_rest.commands import tiny
from tests.helpers import forked

STEPS = 3


@dataclass(frozen=True)
class Row:
    """Where the engines are, and who can be killed there."""

    transport: str
    tensor_parallel: int
    ranks: int
    engines: tuple[str, ...] = ()
    ends: tuple[str, ...] = ("rank", "launcher")

    def __str__(self) -> str:
        return f"{self.transport}-tp{self.tensor_parallel}"

    @property
    def settings(self) -> tuple[str, ...]:
        return (
            f"rollout.replicas={int(self.transport != 'local')}",
            f"weight_sync.transport={self.transport}",
            f"rollout.tensor_parallel={self.tensor_parallel}",
            f"trainer.steps={STEPS}",
            "checkpoint.keep_last=2",
        )

    def losses(self) -> list[Life]:
        """One start, which survives all of them."""
        return [Life(engine=[f"{who} killed in {phase}" for who in self.engines for phase in PHASES])]

    def kills(self) -> list[Life]:
        """A start each, the first in step 2, so that there is a checkpoint to continue from; then the rest of the run.

        Rank 1 where there is one: rank 0 owns the engine, and ends with the launcher anyway.
        """
        cells = [(who, phase) for who in self.ends for phase in PHASES]
        return [
            *(
                Life(
                    end=f"{who} killed",
                    rank=self.ranks - 1,
                    phase=PHASES[phase],
                    delay=0.005 if phase == "transfer" else 0.0,
                    steps=int((who, phase) == cells[0]),
                )
                for who, phase in cells
            ),
            Life(),
        ]


ROWS = [
    Row("local", 1, ranks=1),
    Row("local", 2, ranks=2),
    Row("gloo", 1, ranks=2, engines=("engine",)),
    Row("gloo", 2, ranks=1, engines=("engine", "worker")),
]


class Forked:
    """A launcher with its imports done."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        self.pid, self._process = process.pid, process
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        self.returncode = self._process.exitcode
        if self.returncode is None:
            raise subprocess.TimeoutExpired("launcher", timeout or 0.0)
        return self.returncode


def launch(settings: list[str], environment: Mapping[str, str], output: Path, ranks: int) -> Forked:
    return Forked(forked.start(be_the_launcher, settings, str(output), ranks, env=environment))


def be_the_launcher(settings: list[str], output: str, ranks: int) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="x",
        max_restarts=0, start_method="fork", monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, be_a_rank)(settings)
    except ChildFailedError as error:
        print(error, flush=True)
        os._exit(1)


def be_a_rank(settings: list[str]) -> None:
    resource_tracker._resource_tracker.__init__()  # type: ignore[misc]  # one of its own, as in a new interpreter
    if status := chaos_rank.worker(settings):
        sys.exit(status)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "run_command", lambda *arguments: forked.run_module(*arguments).check_returncode())
        return tiny.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def calm(base: Path) -> Callable[[Row], Path]:
    """The run of a row that was left alone."""

    @cache
    def train(row: Row) -> Path:
        run_dir = base / f"{row}-calm"
        chaos.train(base, run_dir, *row.settings, ranks=row.ranks, launch=launch)
        return run_dir

    return train


def go_through(base: Path, run_dir: Path, row: Row, lives: list[Life]) -> list[str]:
    """The cells of all of these starts; after each everything has to be as promised."""
    happened = chaos.Chaos()
    for life in lives:
        status = chaos.live(happened, base, run_dir, *row.settings, life=life, ranks=row.ranks, launch=launch)
        assert happened.wrong == [], "\n".join(happened.wrong)
        assert (status == 0) == (not life.end), life
    return happened.cells


@pytest.mark.extended
@pytest.mark.alone
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("row", [row for row in ROWS if row.engines], ids=str)
def test_a_lost_engine_is_replaced_whenever_it_goes(base: Path, calm: Callable[[Row], Path], row: Row) -> None:
    run_dir = base / f"{row}-losses"
    cells = go_through(base, run_dir, row, row.losses())
    assert cells == [f"{who} killed in {phase}" for who in row.engines for phase in PHASES]
    assert chaos.metrics_of(run_dir)[-1]["rollout/restarts"] == len(cells)
    assert chaos.differences(calm(row), run_dir, steps=STEPS) == []


@pytest.mark.extended
@pytest.mark.alone
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_run_that_is_killed_continues_whenever_that_was(base: Path, calm: Callable[[Row], Path], row: Row) -> None:
    run_dir = base / f"{row}-kills"
    cells = go_through(base, run_dir, row, row.kills())
    assert cells == [f"{who} killed in {phase}" for who in row.ends for phase in PHASES]
    assert chaos.differences(calm(row), run_dir, steps=STEPS) == []
