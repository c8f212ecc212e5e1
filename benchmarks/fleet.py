"""Engines that are lost or slow, with the real fleet around them: who idles, and what is delivered.

    python -m benchmarks.fleet [--steps 6] [--prompts 24] [--milliseconds 20] [--checkpoints STEPS]

The fleet, the deal of rollouts, the ranks and their exchange are the real ones; an engine is a stand-in that decodes up
to 8 rollouts at once, one token of each an iteration, and sleeps for the time that an iteration takes.  So it measures
what the scheduling costs, whatever else the cores do.  Correctness first: the rollouts of every case must be those of a
single engine.

    replaced   one of four engines is lost in the middle of a step; its successor takes two steps' time to start.
               Idle: share of the time until the step is over in which an engine has nothing to decode
    slow       two engines, one at a third of the other's speed; tokens a second, to those that both deliver together

``--checkpoints`` trains the tiny model with a real engine, one step off, with a checkpoint every step and without: the
metrics must be equal, and the median of the steps' times is compared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import chaos
from megatron_rest.commands.tiny import make_base
from megatron_rest.rollout.engine import (
    Cut,
    EngineLostError,
    Exam,
    MoreRequests,
    OnRollout,
    RolloutRequest,
    make_requests,
)
from megatron_rest.trainer.fleet import EngineFleet
from megatron_rest.types import PromptSample, Rollout, StopReason
from tests.helpers.distributed import run_distributed
from tests.helpers.stand_in import StandInEngine, fleet_of, give_weights

AT_ONCE = 8
SHORTEST, LONGEST = 16, 64  # tokens of a response


class PacedEngine(StandInEngine):
    """Decodes in time, without arithmetic.

    Args:
        seconds: of an iteration.
        start_seconds: of a process.
    """

    def __init__(self, seconds: float, start_seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds, self.start_seconds = seconds, start_seconds
        self.dies_after: int | None = None  # iterations of its next run
        self.busy = 0.0  # seconds in which it decoded
        self.tokens = 0

    def wait_ready(self) -> None:
        if self.num_restarts:
            time.sleep(self.start_seconds)

    def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_tokens: int,
        on_rollout: OnRollout,
        exam: Exam | None = None,
        more: MoreRequests | None = None,
    ) -> None:
        """As vLLM: what does not fit waits, what ends makes room."""
        assert more is not None
        waiting, running = list(requests), {}
        new: Sequence[RolloutRequest] | Cut | None = ()
        while waiting or running or new is not None:
            while waiting and len(running) < AT_ONCE:
                request = waiting.pop(0)
                running[request.key] = [request, length_of(request)]
            if self.dies_after is not None:
                self.dies_after -= 1
                if self.dies_after < 0:
                    self.dies_after, self.alive = None, False
                    raise EngineLostError("as the benchmark says")
            if running:
                time.sleep(self.seconds)
                self.busy += self.seconds
                self.tokens += len(running)
            else:
                time.sleep(0.001)
            for key, entry in list(running.items()):
                entry[1] -= 1
                if entry[1] == 0:
                    del running[key]
                    on_rollout(key, answer(entry[0], self.policy_version))
            if new is not None:
                new = more()
                assert new is not Cut.NOW
                waiting += new or ()


def length_of(request: RolloutRequest) -> int:
    return int(np.random.default_rng(request.seed).integers(SHORTEST, LONGEST + 1))


def answer(request: RolloutRequest, version: int) -> Rollout:
    size = length_of(request)
    return Rollout(
        prompt_id=request.prompt.prompt_id,
        token_ids=np.random.default_rng(request.seed).integers(0, 1000, size).astype(np.int32),
        log_probs=np.zeros(size, np.float32),
        loss_mask=np.ones(size, bool),
        stop_reason=StopReason.EOS,
        policy_version=version,
    )


class _NoSync:
    def __init__(self, engine: PacedEngine | None) -> None:
        self.engine = engine

    def push(self, version: int) -> int:
        if self.engine is not None:
            self.engine.policy_version = version
        return version

    def close(self) -> None: ...


def make(rank: int, ranks: int, engine: PacedEngine) -> EngineFleet:
    settings = {"rollouts_per_prompt": 4, "max_concurrent": AT_ONCE}
    return fleet_of(
        engine, lambda is_member: _NoSync(engine if is_member else None), rank=rank, ranks=ranks, **settings
    )


def one_step(fleet: EngineFleet, prompts: Sequence[PromptSample], version: int) -> list[list[int]]:
    """Deliver weights, roll out; what was sampled, as sums of tokens by group."""
    give_weights(fleet, version)
    fleet.plan(prompts, seed=version)
    fleet.begin()
    groups = fleet.collect(refresh=partial(give_weights, fleet, version))
    return [[int(r.token_ids.sum()) for r in group.rollouts] for group in groups]


def prompts_of(count: int) -> list[PromptSample]:
    return [PromptSample(prompt_id=f"p{i}", token_ids=np.zeros(1, np.int32), ground_truth="") for i in range(count)]


def replaced(rank: int, ranks: int, count: int, seconds: float) -> tuple[list[list[int]], float, float]:
    """Sampled in the step of the loss; this engine's idle share in it, and in the step before."""
    prompts = prompts_of(count)
    usual = count * 4 * (SHORTEST + LONGEST) / 2 * seconds / AT_ONCE / ranks
    engine = PacedEngine(seconds, start_seconds=2 * usual)
    fleet = make(rank, ranks, engine)
    idle, sampled = [], []
    for version in range(3):
        if version == 2 and rank == ranks - 1:
            engine.dies_after = int(usual / seconds / 2)
        before, began = engine.busy, time.monotonic()
        sampled = one_step(fleet, prompts, version)
        idle.append(1 - (engine.busy - before) / (time.monotonic() - began))
    return sampled, idle[-1], idle[-2]


def slow(rank: int, ranks: int, count: int, seconds: float, steps: int, factor: float) -> tuple[Any, float]:
    """Sampled in the last step; tokens a second of all engines together from the second step on (speeds are known)."""
    prompts = prompts_of(count)
    fleet = make(rank, ranks, PacedEngine(seconds * (factor if rank == 0 else 1.0)))
    sampled, tokens, began = [], 0, 0.0
    for version in range(steps):
        if version == 1:
            began = time.monotonic()
        sampled = one_step(fleet, prompts, version)
        tokens += sum(length for length in _lengths(prompts, version)) if version else 0
    return sampled, tokens / (time.monotonic() - began)


def _lengths(prompts: Sequence[PromptSample], version: int) -> list[int]:
    return [length_of(r) for r in make_requests(prompts, rollouts_per_prompt=4, seed=version)]


def alone(rank: int, ranks: int, count: int, version: int) -> list[list[int]]:
    fleet = make(rank, ranks, PacedEngine(0.0))
    return one_step(fleet, prompts_of(count), version)


def checkpoints(steps: int) -> list[dict[str, float]]:
    """Median seconds of a step by phase, the first three left out: without checkpoints, and with one every step."""
    with tempfile.TemporaryDirectory() as folder:
        base, found, seconds = make_base(Path(folder)), [], []
        for every in (0, 1):
            run_dir = Path(folder) / f"every-{every}"
            overrides = ("rollout.max_staleness=1", "loss.tis_cap=2.0", f"trainer.steps={steps}", "trainer.threads=1")
            status, output = chaos.start(base, run_dir, *overrides, f"checkpoint.save_every={every}", ranks=1)
            if status:
                raise RuntimeError(output[-4000:])
            rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            timed = ("sync/seconds", "seconds/")
            found.append([{k: v for k, v in r["metrics"].items() if not k.startswith(timed)} for r in rows])
            phases = {name for row in rows for name in row["seconds"]}
            seconds.append({name: median(row["seconds"].get(name, 0.0) for row in rows[3:]) for name in phases})
    assert found[0] == found[1], "checkpoints changed the run"
    return seconds


def main() -> None:
    """Run both cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="of the case slow")
    parser.add_argument("--prompts", type=int, default=24, help="of a step, four rollouts each")
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of an iteration, one token of 8 rollouts")
    parser.add_argument("--checkpoints", type=int, default=0, metavar="STEPS", help="only this: train so many steps")
    args = parser.parse_args()
    if args.checkpoints:
        without, every = checkpoints(args.checkpoints)
        for name in sorted(without.keys() | every.keys(), key=lambda name: -every.get(name, 0.0)):
            print(f"{name:12s} {without.get(name, 0.0):7.3f} s a step without, {every.get(name, 0.0):7.3f} with one")
        print(f"checkpoints: {every['total'] / without['total']:.2f}")
        return
    seconds = args.milliseconds / 1000
    [expected] = run_distributed(alone, 1, args.prompts, 2)
    ranks = run_distributed(replaced, 4, args.prompts, seconds)
    assert all(sampled == expected for sampled, _, _ in ranks), "other rollouts than without the loss"
    for rank, (_, with_loss, without) in enumerate(ranks):
        print(f"replaced: engine {rank} idle {with_loss:.1%} of the step; {without:.1%} of the one before")
    [expected] = run_distributed(alone, 1, args.prompts, args.steps - 1)
    speeds = {}
    for factor in (1.0, 3.0):
        found = run_distributed(slow, 2, args.prompts, seconds, args.steps, factor)
        assert all(sampled == expected for sampled, _ in found), "other rollouts than from one engine"
        speeds[factor] = found[0][1]
    both = speeds[1.0] / 2 * (1 + 1 / 3)
    print(f"slow: {speeds[3.0]:.0f} tokens/s; two equal ones {speeds[1.0]:.0f}, so both together {both:.0f}: "
          f"{speeds[3.0] / both:.2f} of it")  # fmt: skip


if __name__ == "__main__":
    main()
