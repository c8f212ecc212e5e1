"""Judged rollouts as lines for people (``data/sample_file.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from megatron_rest.trainer.judge import Verdict
from megatron_rest.types import RewardOutput, RolloutGroup, TokenRegion

__all__ = ["chosen", "sample_rows"]


def chosen(verdict: Verdict, count: int) -> list[int]:
    """At most ``count`` rollouts worth reading: best, worst, and others evenly spread over the rewards."""
    order = sorted(range(len(verdict.rewards)), key=lambda i: (verdict.rewards[i].total, i))
    if count >= len(order):
        return list(range(len(order)))
    places = np.linspace(len(order) - 1, 0, count).round().astype(int) if count > 1 else [len(order) - 1] * count
    return sorted({order[place] for place in places})


def sample_rows(
    groups: Sequence[RolloutGroup], verdict: Verdict, table: Sequence[bytes], *, step: int, only: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each rollout of ``only`` (places in the step); ``table`` holds the bytes of every token."""
    places = [(number, i) for number, group in enumerate(groups) for i in range(len(group.rollouts))]
    for index in only:
        number, sibling = places[index]
        prompt, rollout = groups[number].prompt, groups[number].rollouts[sibling]
        sample, reward = verdict.samples[index], verdict.rewards[index]
        regions = sample.region_ids[len(prompt.token_ids) :]
        yield {
            "step": step,
            "index": index,
            "prompt_id": prompt.prompt_id,
            "group": number,
            "sibling": sibling,
            "policy_version": rollout.policy_version,
            "oldest_version": rollout.oldest_version,
            "stop_reason": str(rollout.stop_reason),
            "is_judged": verdict.is_judged[index],
            "prompt": _text(table, prompt.token_ids),
            "messages": prompt.messages,
            "tools": prompt.tools,
            "metadata": prompt.metadata,
            "reference": prompt.ground_truth,
            "answer": _text(table, rollout.token_ids),
            "regions": _runs(table, rollout.token_ids, regions),
            "reward": _numbers(reward) | {"static": verdict.static_rewards[index]},
            "token_rewards": _earned(reward),
            "advantage": sample.advantage,
            "findings": list(reward.detail),
        }


def _text(table: Sequence[bytes], token_ids: np.ndarray) -> str:
    return b"".join(table[i] for i in token_ids).decode("utf-8", errors="replace")


def _runs(table: Sequence[bytes], token_ids: np.ndarray, regions: np.ndarray) -> list[list[str]]:
    return [
        [TokenRegion(int(region)).name.lower(), _text(table, token_ids[[i for i, _ in run]])]
        for region, run in groupby(enumerate(regions.tolist()), key=lambda pair: pair[1])
    ]


def _numbers(reward: RewardOutput) -> dict[str, float]:
    said = {
        "total": reward.total,
        "format": reward.format,
        "correctness": reward.correctness,
        "accuracy": reward.accuracy,
        "format_valid": reward.is_format_valid,
        **reward.parts,
    }
    return {name: float(value) for name, value in said.items() if value is not None}


def _earned(reward: RewardOutput) -> list[list[float]]:
    if reward.token_rewards is None or reward.is_rewarded is None:
        return []
    return [[int(i), float(reward.token_rewards[i])] for i in np.flatnonzero(reward.is_rewarded)]
