"""What a recipe does at its real size, simulated on one CPU with the code that will run.

    megatron-rest simulate launch/rest_70b.py [section.key=value ...]
    megatron-rest simulate launch/rest_70b.py --ranks 1024 rollout.replicas=32
    megatron-rest simulate run.yaml --only balance,transfer --median-response 900

One page: bounds that are missed first.  Parts: balance (packing and pipeline), transfer (plans, links, windows),
exchange (bytes of rollouts), judging (a rank's host), start (process groups).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from megatron_rest.config import ConfigError, Fp8Recipe, PrecisionConfig, RestConfig, load
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.__main__ import recipe_or_file
from megatron_rest.planner.lengths import Lengths
from megatron_rest.planner.shapes import find_shape
from megatron_rest.simulate.findings import Finding, page

__all__ = ["main", "simulate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is simulated."""

    config: RestConfig
    shape: ModelShape
    lengths: Lengths
    world_size: int
    rank: int


def main(argv: list[str] | None = None) -> int:
    """0: every bound reached; 1: one is missed; 2: the configuration cannot run at all."""
    parser = argparse.ArgumentParser(
        prog="megatron-rest simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a recipe (launch/NAME.py) or a run.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    parser.add_argument("--ranks", type=int, default=0, help="training ranks (default: the recipe's, or one replica)")
    parser.add_argument("--rank", type=int, default=0, help="the rank whose start and dry run are looked at (0)")
    parser.add_argument("--only", default="", metavar="PART,...", help=f"some of {', '.join(_PARTS)}")
    parser.add_argument(
        "--median-response", type=float, default=0, metavar="TOKENS",
        help="responses are log-normal about it (default: the plan's lengths)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_intermixed_args(argv)
    parts = args.only.split(",") if args.only else list(_PARTS)
    if unknown := [part for part in parts if part not in _PARTS]:
        parser.error(f"--only {unknown[0]}: expected some of {', '.join(_PARTS)}")
    try:
        base, file, ranks, _ = recipe_or_file(args.config)
        config = load(file, args.overrides, base=base)
        p = config.parallel
        world_size = args.ranks or ranks or p.replica_size
        p.data_parallel(world_size)
        if not 0 <= args.rank < world_size:
            parser.error(f"--rank {args.rank}: there are {world_size}")
        shape, _ = find_shape(config.model.path, config.model.shape)
        subject = Subject(
            config=config, shape=shape, lengths=_lengths(config, args.median_response), world_size=world_size,
            rank=args.rank,
        )  # fmt: skip
        findings = simulate(subject, parts)
    except ConfigError as error:
        print(f"megatron-rest simulate: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([asdict(f) | {"is_reached": f.is_reached} for f in findings], indent=1))
    else:
        print(page(f"{args.config} on {world_size} ranks, simulated", findings))
    return 0 if all(f.is_reached for f in findings) else 1


def simulate(subject: Subject, parts: list[str]) -> list[Finding]:
    """Numbers of the named parts, in their order."""
    return [finding for part in parts for finding in _PARTS[part](subject)]


def _lengths(config: RestConfig, median: float) -> Lengths:
    if not median:
        return Lengths.of(config)
    from megatron_rest.simulate.balance import RLLA_PROMPTS, long_tailed

    prompts = [min(n, config.data.max_prompt_tokens) for n in RLLA_PROMPTS]
    return long_tailed(median=median, most=config.rollout.max_response_tokens, prompts=prompts)


def _balance(subject: Subject) -> list[Finding]:
    from megatron_rest.simulate.balance import simulate_balance

    found = simulate_balance(subject.config, subject.shape, subject.lengths, world_size=subject.world_size)
    detail = (
        f"{found.microbatches} microbatches a replica, {found.empty:.0%} empty, {found.padding:.0%} padding, slowest "
        f"replica {found.imbalance:.2f} of the mean"
    )
    bound = 90.0 if subject.config.parallel.pipeline_parallel > 1 else 95.0
    return [Finding(name="balance: time of the GPUs that computes", value=100 * found.share, unit="%", bound=bound,
                    at_most=False, detail=detail)]  # fmt: skip


def _transfer(subject: Subject) -> list[Finding]:
    from megatron_rest.weight_sync.timing import simulate_push

    if not subject.config.rollout.replicas:
        return [Finding(name="transfer: colocated engines take tensors by reference", value=0, unit="messages")]
    found = simulate_push(subject.config, subject.shape, world_size=subject.world_size)
    name = "transfer: "
    return [
        Finding(name=name + "share of line rate", value=100 * found.share, unit="%", bound=85, at_most=False,
                detail=f"{found.seconds:.3f} s, at least {found.limit:.3f}"),
        Finding(name=name + "all plans, CPU of every rank", value=found.plan_seconds, unit="s", bound=5),
        Finding(name=name + "messages a worker", value=found.messages, unit="", bound=1000),
        Finding(name=name + "results a push, on every rank", value=found.result_bytes / 1e6, unit="MB", bound=20),
        Finding(name=name + "ranks in an engine's group", value=found.ranks_of_a_group, unit="",
                detail=f"a rank is in {found.groups_of_a_rank}"),
        Finding(name=name + "bytes of the busiest sender over the mean", value=found.imbalance, unit="", bound=1.1),
    ]  # fmt: skip


def _exchange(subject: Subject) -> list[Finding]:
    from megatron_rest.simulate.exchange import simulate_exchange

    config = subject.config
    found = simulate_exchange(
        rollouts=config.data.prompts_per_step * config.rollout.rollouts_per_prompt,
        response=round(subject.lengths.response),
        world_size=subject.world_size,
    )
    detail = f"{found.received / 1e6:,.0f} MB a rank and step"
    return [Finding(name="exchange: bytes received over what rollouts say", value=found.ratio, unit="", bound=1.5,
                    detail=detail)]  # fmt: skip


def _judging(subject: Subject) -> list[Finding]:
    from megatron_rest.simulate.judging import simulate_judging

    config = subject.config
    found = simulate_judging(
        rollouts=config.data.prompts_per_step * config.rollout.rollouts_per_prompt,
        response=round(subject.lengths.response),
        world_size=subject.world_size,
        replicas=config.parallel.data_parallel(subject.world_size),
        group_size=config.rollout.rollouts_per_prompt,
    )
    detail = f"{found.reading:.2f} s if one rank read all; {found.received / 1e6:,.0f} MB received"
    return [Finding(name="judging: CPU of a rank and step", value=found.seconds, unit="s", bound=1, detail=detail)]


def _start(subject: Subject) -> list[Finding]:
    from megatron_rest.simulate.start import simulate_start

    found = simulate_start(_unquantised(subject.config), rank=subject.rank, world_size=subject.world_size)
    return [
        Finding(name="start: groups that a rank makes", value=found.made, unit="", bound=200),
        Finding(name="start: connections of a rank's groups", value=found.sockets, unit="", bound=500,
                detail=f"{sum(n - 1 for n in found.members):,} if every pair connected"),
    ]  # fmt: skip


def _unquantised(config: RestConfig) -> RestConfig:
    """FP8 needs its GPU; groups, parameters and checkpoints are the same without."""
    if config.precision.recipe is Fp8Recipe.NONE:
        return config
    return replace(config, precision=PrecisionConfig())


_PARTS: dict[str, Callable[[Subject], list[Finding]]] = {
    "balance": _balance,
    "transfer": _transfer,
    "exchange": _exchange,
    "judging": _judging,
    "start": _start,
}

if __name__ == "__main__":
    sys.exit(main())
