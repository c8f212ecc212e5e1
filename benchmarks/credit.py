"""What token credit costs a rank and step, on one core: from samples and gathered statistics to weights or advantages.

    python -m benchmarks.credit [--rollouts 2048] [--tokens 4096] [--group 16] [--rules otb,gtpo] [--json out.json]

Every rule sees all rollouts of the step, as one whose scope is the step does in training; the time includes making the
rows and checking the credit, and is CPU time, so that a shared machine counts as an idle one.  The goal is 1 s.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_rest.algorithms import JudgedRollouts, find_estimator
from megatron_rest.config import ADVANTAGE_NAMES, AdvantageConfig, WeightingConfig, WeightSource
from megatron_rest.credit_traits import BUILT_IN, traits_of
from megatron_rest.types import TokenRegion, TrainSample
from megatron_rest.weighting import CreditRows, find_credit

__all__ = ["main", "step_of"]

_GOAL = 1.0  # seconds
_PROMPT = 64
_RULES = [name for name in BUILT_IN if name not in list(WeightSource) or name == "constant"]


def step_of(rollouts: int, tokens: int, group: int, *, seed: int = 0) -> tuple[list[TrainSample], np.ndarray]:
    """Samples with answers of exactly ``tokens`` tokens in two turns, and their rewards."""
    rng = np.random.default_rng(seed)
    rewards = rng.integers(-3, 5, rollouts).astype(float)
    mask = np.arange(_PROMPT + tokens + 8) >= _PROMPT
    mask[_PROMPT + tokens // 2 : _PROMPT + tokens // 2 + 8] = False  # a tool's output
    samples = []
    for i in range(rollouts):
        mine = rewards[i // group * group : (i // group + 1) * group]
        samples.append(
            TrainSample(
                token_ids=np.zeros(len(mask), np.int32),
                loss_mask=mask,
                region_ids=np.where(mask, rng.integers(1, len(TokenRegion), len(mask)), 0).astype(np.int8),
                rollout_log_probs=np.zeros(len(mask), np.float32),
                advantage=float(rewards[i] - mine.mean()),
                sequence_id=i,
                group_id=i // group,
                marks=np.zeros(len(mask), np.uint8),
            )
        )
    return samples, rewards


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--rules", default=",".join(_RULES), help="of weighting.source, with commas")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    samples, rewards = step_of(args.rollouts, args.tokens, args.group)
    count = sum(int(s.loss_mask.sum()) for s in samples)
    rng = np.random.default_rng(1)
    log_probs = -rng.exponential(0.5, count).astype(np.float32)
    entropy = rng.gamma(0.5, 1.0, count).astype(np.float32)
    measured = {"log_probs": log_probs, "entropy": entropy, "sum_p2": np.exp(2 * log_probs), "beta": entropy}
    rewarded = [replace(s, token_rewards=rng.integers(0, 2, len(s.loss_mask)) / args.tokens) for s in samples]
    seconds: dict[str, float] = {}
    for name in args.rules.split(","):
        rule = find_credit(WeightingConfig(source=name))
        scores = {n: measured[n] for n in traits_of(name).measured if not rule.traits.follows}
        mine = rewarded if "token_rewards" in rule.traits.needs else samples
        start = time.process_time()
        rows = CreditRows.of_samples(mine, rewards=rewards, progress=0.5, scores=scores)
        made = time.process_time() - start
        rule.credit(rows).check(rows, rule.traits, name)
        seconds[name] = time.process_time() - start
        verdict = "" if seconds[name] <= _GOAL else f"   over the goal of {_GOAL:g} s"
        print(f"{name:<14}{seconds[name]:>8.2f} s, of which rows {made:.2f} s{verdict}", flush=True)
    parts = {"format": rewards / 2, "correctness": rewards - rewards / 2}
    judged = JudgedRollouts(rewards=rewards, groups=np.arange(len(samples)) // args.group, parts=parts)
    for name in ADVANTAGE_NAMES:
        start = time.process_time()
        find_estimator(AdvantageConfig(estimator=name))(judged)
        seconds[f"advantage {name}"] = time.process_time() - start
        print(f"{'advantage ' + name:<32}{seconds[f'advantage {name}'] * 1e3:>8.1f} ms")
    if args.json:
        args.json.write_text(json.dumps({"tokens": count, "seconds": seconds}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
