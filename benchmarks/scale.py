"""The recipes and larger jobs at their real size, simulated: every bound, reached or missed, and nothing got worse.

    python -m benchmarks.scale [--only balance,transfer,...] [--record]

A missed bound is printed with its number, first and again at the end, and is no failure; what is worse than
``benchmarks/scale.json`` has it is one, and so is a bound that it has as reached (``--record`` writes that file).
Three minutes on one core; nothing is measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rest.config import RestConfig, load
from megatron_rest.mcore.dry import dry_rank
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.__main__ import recipe_or_file
from megatron_rest.planner.hardware import HARDWARE
from megatron_rest.planner.plan import make_plan
from megatron_rest.planner.published import POINTS
from megatron_rest.planner.shapes import PUBLISHED, find_shape
from megatron_rest.simulate.apart import run_apart
from megatron_rest.simulate.balance import long_tailed, simulate_balance
from megatron_rest.simulate.exchange import simulate_exchange
from megatron_rest.simulate.findings import Finding, page
from megatron_rest.simulate.judging import simulate_judging
from megatron_rest.simulate.start import simulate_start
from megatron_rest.weight_sync.layouts import EngineLayout, TrainingLayout
from megatron_rest.weight_sync.timing import simulate_transfer

RECORD = Path(__file__).with_suffix(".json")
WORSE = 1.05  # of a recorded value
WORSE_SECONDS = 3.0  # of a recorded time of this machine: others are slower, or busy
WIDE = [  # the recipe's layout for many replicas, as it says itself
    "parallel.tensor_parallel=8", "parallel.pipeline_parallel=4", "trainer.max_tokens_per_microbatch=8192",
]  # fmt: skip
LARGE = [  # the largest job: 16,384 rollouts of up to 8,192 tokens
    "data.prompts_per_step=2048", "rollout.rollouts_per_prompt=8", "rollout.replicas=32", "rollout.nodes=32",
    "model.max_sequence_length=8192", "data.max_prompt_tokens=4096", "rollout.max_response_tokens=4096",
    *WIDE, "trainer.max_tokens_per_microbatch=16384",
]  # fmt: skip
NO_FP8 = ["precision.recipe=none", "precision.bf16_layers_start=0", "precision.bf16_layers_end=0"]


def recipe(name: str, *overrides: str) -> tuple[RestConfig, int, ModelShape]:
    base, _, gpus, _ = recipe_or_file(f"launch/{name}.py")
    config = load(None, list(overrides), base=base)
    return config, gpus, find_shape(config.model.path, config.model.shape)[0]


def balance() -> Iterator[Finding]:
    # Name, recipe, ranks, median response, goal
    cases: list[tuple[str, str, int, float, float, list[str]]] = [
        ("70B on 64", "rest_70b", 64, 900, 97, []),
        ("70B on 64, TP 8 x PP 4", "rest_70b", 64, 900, 97, WIDE),
        ("70B on 256", "rest_70b", 256, 900, 92, WIDE),
        ("70B on 1,024, 16,384 rollouts", "rest_70b", 1024, 1800, 92, LARGE),
        ("30B-A3B on 16", "rest_30b_a3b", 16, 900, 90, []),
    ]
    for name, of, ranks, median, goal, overrides in cases:
        config, _, shape = recipe(of, *overrides)
        lengths = long_tailed(median=median, most=config.rollout.max_response_tokens)
        for is_sharing in (False, True):
            found = simulate_balance(config, shape, lengths, world_size=ranks, is_sharing=is_sharing)
            how = "prompts shared" if is_sharing else "plain packing"
            detail = f"{found.microbatches} microbatches, {found.empty:.0%} empty, {found.padding:.0%} padding"
            # With shared prompts there is less to compute; how evenly it lies is another question.
            yield Finding(name=f"balance: {name}, {how}", value=100 * found.share, unit="%",
                          bound=None if is_sharing else goal, at_most=False, detail=detail)  # fmt: skip
            if config.parallel.pipeline_parallel > 1 and not is_sharing:
                yield Finding(name=f"balance: {name}, of what any dealing could reach", bound=96, at_most=False,
                              value=100 * found.share / found.possible, unit="%",
                              detail=f"{found.possible:.1%} of the time")  # fmt: skip
                yield Finding(name=f"balance: {name}, with the head in the last stage", at_most=False,
                              value=100 * found.share_with_head, unit="%")  # fmt: skip


def layout_of(config: RestConfig, ranks: int) -> TrainingLayout:
    p = config.parallel
    return TrainingLayout(
        tensor_parallel=p.tensor_parallel,
        pipeline_parallel=p.pipeline_parallel,
        virtual_pipeline=p.virtual_pipeline,
        data_parallel=p.data_parallel(ranks) * p.context_parallel,
        expert_parallel=p.expert_parallel,
    )


def transfer() -> Iterator[Finding]:
    moe = ModelShape.from_hf_config(PUBLISHED["Qwen3-235B-A22B"])
    of_large, _, large = recipe("rest_70b")
    wide, _, _ = recipe("rest_70b", *WIDE)
    of_small, _, small = recipe("rest_30b_a3b")
    cases = [
        ("70B 64 -> 4 x 8", large, layout_of(of_large, 64), 8, 4, 512 << 20),
        ("30B 16 -> 2 x 4", small, layout_of(of_small, 16), 4, 2, 256 << 20),
        ("70B 1,024 -> 32 x 8", large, layout_of(wide, 1024), 8, 32, 512 << 20),
        ("235B 128 -> 4 x 8", moe, TrainingLayout(tensor_parallel=4, pipeline_parallel=2, data_parallel=16,
         expert_parallel=32), 8, 4, 256 << 20),
    ]  # fmt: skip
    for name, shape, training, workers, engines, message_bytes in cases:
        found = simulate_transfer(
            shape, training, EngineLayout(tensor_parallel=workers), engines, message_bytes=message_bytes
        )
        assert found.moved == found.needed
        yield Finding(name=f"transfer: {name}, share of line rate", value=100 * found.share, unit="%", bound=85,
                      at_most=False, detail=f"{found.seconds:.3f} s, at least {found.limit:.3f}")  # fmt: skip
        yield Finding(name=f"transfer: {name}, plans of a rank", value=found.plan_seconds, unit="s", bound=5)
        yield Finding(name=f"transfer: {name}, messages a worker", value=found.messages, unit="", bound=1000)
        yield Finding(name=f"transfer: {name}, results a push", value=found.result_bytes / 1e6, unit="MB", bound=20)
        yield Finding(name=f"transfer: {name}, ranks in an engine's group", value=found.ranks_of_a_group, unit="")


def exchange() -> Iterator[Finding]:
    found = simulate_exchange(rollouts=16384, response=8192, world_size=1024)
    yield Finding(name="exchange: 16,384 x 8,192 on 1,024 ranks, over the information", value=found.ratio, unit="",
                  bound=1.5, detail=f"{found.received / 1e9:.2f} GB a rank")  # fmt: skip


def judging() -> Iterator[Finding]:
    found = simulate_judging(rollouts=16384, response=8192, world_size=1024, replicas=32)
    detail = (
        f"{found.reading:.0f} s to read all, {found.comparing:.2f} s on every rank, {found.composing:.1f} s to put all "
        f"samples together, {found.received / 1e6:.0f} MB"
    )
    yield Finding(name="judging: 16,384 x 8,192 on 1,024 ranks, a rank's CPU", value=found.seconds, unit="s", bound=1,
                  detail=detail)  # fmt: skip


def start() -> Iterator[Finding]:
    config, _, _ = recipe("rest_70b", *NO_FP8, "rollout.replicas=32", "rollout.nodes=32")
    found = run_apart(simulate_start, config, rank=0, world_size=1024)
    yield Finding(name="start: 70B on 1,024, groups that a rank makes", value=found.made, unit="", bound=200)
    yield Finding(name="start: 70B on 1,024, connections of a rank", value=found.sockets, unit="", bound=500,
                  detail=f"{sum(n - 1 for n in found.members):,} if every pair connected")  # fmt: skip


WAITS_OF_ROTATION = 4  # Megatron's unfused rotary embedding looks at the bounds of sequences for q and k, twice each
WAITS_OF_ROUTING = 1  # rows that each expert gets: the all-to-all's messages have these sizes


def dry() -> Iterator[Finding]:
    for name, ranks in (("rest_8b", (0,)), ("rest_70b", (0, 56)), ("rest_30b_a3b", (0,))):
        config, gpus, shape = recipe(name, *NO_FP8, "trainer.share_prompts=off")
        plan = make_plan(config, HARDWARE["cpu"], world_size=gpus)
        for rank in ranks:
            found = run_apart(dry_rank, config, shape, rank=rank, world_size=gpus)
            stage = plan.stages[found.stage]
            planned = {item.name: item.num_bytes for item in (*stage.always, *stage.training)}
            who = f"dry: {name} rank {rank}"
            yield Finding(name=f"{who}, parameters over planned", value=2 * found.parameters / planned["weights"],
                          unit="", bound=1.0)  # fmt: skip
            update = sum(item.num_bytes for item in stage.training)
            yield Finding(name=f"{who}, peak of an update over planned", value=found.update / update, unit="",
                          bound=1.1, detail=f"{found.update / 1e9:.2f} GB")  # fmt: skip
            owned = found.optimizer + found.weights
            yield Finding(name=f"{who}, a periodic save over what is owned", value=(owned + found.saving) / owned,
                          unit="", bound=1.2, detail=f"{found.saving / 1e9:.2f} GB more")  # fmt: skip
            passes = shape.num_layers // config.parallel.pipeline_parallel * (1 + (config.parallel.recompute == "full"))
            yield Finding(name=f"{who}, waits of the host a layer and forward pass",
                          value=sum(found.waits.values()) / passes, unit="",
                          bound=WAITS_OF_ROTATION + (WAITS_OF_ROUTING if shape.num_experts else 0))  # fmt: skip


def honesty() -> Iterator[Finding]:
    ratios = {f"{point.name} ({point.source.rpartition(', ')[2]})": point.ratio() for point in POINTS}
    for name, ratio in ratios.items():
        yield Finding(name=f"honesty: {name}", value=max(ratio, 1 / ratio), unit="", bound=1.4,
                      detail=f"planned time over published {ratio:.2f}")  # fmt: skip


PARTS: dict[str, Callable[[], Iterator[Finding]]] = {
    "balance": balance,
    "transfer": transfer,
    "exchange": exchange,
    "judging": judging,
    "start": start,
    "dry": dry,
    "honesty": honesty,
}


def worse(findings: list[Finding], recorded: dict[str, float]) -> list[str]:
    """What is not as good as it was recorded, or misses a bound that it reached: a time of this machine may."""
    lines = []
    for finding in findings:
        before = recorded.get(finding.name)
        if before is None:
            continue
        factor = WORSE_SECONDS if finding.unit == "s" else WORSE
        is_worse = finding.value > before * factor if finding.at_most else finding.value < before / factor
        is_lost = finding.unit != "s" and not finding.is_reached and replace(finding, value=before).is_reached
        if is_worse or is_lost:
            bound = f", and misses its bound of {finding.bound:.4g}" if is_lost else ""
            lines.append(f"{finding.name}: {finding.value:.4g} {finding.unit}, recorded {before:.4g}{bound}")
    return lines


def verdict(findings: list[Finding], lines: list[str]) -> str:
    """The last line: a bound that is missed is never said to be kept, whatever was recorded."""
    missed = [finding.name for finding in findings if not finding.is_reached]
    reached = sum(finding.bound is not None for finding in findings) - len(missed)
    text = f"{reached} bounds reached, {len(missed)} MISSED" + (f" ({'; '.join(missed)})" if missed else "")
    return f"{text}; {len(lines)} numbers are worse than recorded" + (
        "" if lines else ": exit status 0 says this alone"
    )


def main(argv: list[str] | None = None) -> int:
    """0: nothing is worse than recorded; 1: something is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--record", action="store_true", help="write what is found as what is expected")
    args = parser.parse_args(argv)
    began = time.monotonic()
    findings: list[Finding] = []
    for part in args.only.split(",") if args.only else PARTS:
        findings += PARTS[part]()
    print(page("simulated at real size", findings))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    peak = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6)
    print(f"{time.monotonic() - began:.0f} s, {peak:.1f} GB")
    recorded: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if args.record:
        RECORD.write_text(json.dumps(recorded | {f.name: float(f"{f.value:.4g}") for f in findings}, indent=1) + "\n")
        return 0
    lines = worse(findings, recorded)
    for line in lines:
        print(f"WORSE: {line}", file=sys.stderr)
    print(verdict(findings, lines))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
