"""Seconds of a rank's host between a step's rollouts and its samples, by the trainer's own judge on long answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megatron_rest.config import AdvantageConfig, RewardConfig
from megatron_rest.regions import TOOLRL
from megatron_rest.trainer.judge import Judge
from megatron_rest.trainer.reading import share_of
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason, TrainSample

__all__ = ["Judging", "simulate_judging"]

_T = TypeVar("_T")

_CHARACTERS = 4  # a token has about so many
_AGAIN = 64  # times that they are compared: one time is too short to be timed
_READ = 1 << 16  # tokens that are judged for it; what it takes is proportional


@dataclass(frozen=True, kw_only=True, slots=True)
class Judging:
    """CPU seconds of this machine; the exchange of what was read is not in them."""

    reading: float  # of all rollouts on one rank: parsing, rewards, regions
    share: float  # of the tokens that the busiest rank reads
    comparing: float  # of all rollouts, on every rank: rewards, advantages, what samples are made of
    composing: float  # of all samples on one rank
    trained: float  # share of the samples that a rank trains on, and composes
    received: int  # bytes that a rank receives of the others' reading

    @property
    def seconds(self) -> float:
        return self.reading * self.share + self.comparing + self.composing * self.trained


def simulate_judging(*, rollouts: int, response: int, world_size: int, replicas: int, group_size: int = 8) -> Judging:
    """Of ``rollouts`` thoughts of ``response`` tokens with a call at their end; ``replicas`` share the samples."""
    count = max(_READ // response // group_size, 1) * group_size
    call = TOOLRL.write([("get_weather", {"city": "Bern", "days": 3})])
    words = "The user wants the weather of Bern, so the tool is asked for three days. "
    room = _CHARACTERS * response - len(call) - len("<think></think>\n")
    answer = f"<think>{(words * (room // len(words) + 1))[:room]}</think>\n{call}"
    pieces = [answer[at : at + _CHARACTERS].encode() for at in range(0, len(answer), _CHARACTERS)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    ids = np.array([vocabulary[piece] for piece in pieces], np.int32)

    def rollout() -> Rollout:
        return Rollout(
            prompt_id="p", token_ids=ids, log_probs=np.zeros(len(ids), np.float32), loss_mask=np.ones(len(ids), bool),
            stop_reason=StopReason.EOS, policy_version=0,
        )  # fmt: skip

    prompt = PromptSample(prompt_id="p", token_ids=np.zeros(1024, np.int32), ground_truth=call)
    groups = [
        RolloutGroup(prompt=prompt, rollouts=tuple(rollout() for _ in range(group_size)))
        for _ in range(count // group_size)
    ]
    judge = Judge(list(vocabulary), reward=RewardConfig(), advantage=AdvantageConfig())
    both, _ = _cpu_seconds(lambda: judge(groups, step=1))
    comparing, verdict = _cpu_seconds(lambda: judge(groups * _AGAIN, step=1))  # the same rollouts: read already
    composing, _ = _cpu_seconds(lambda: _look_at(verdict.samples))
    comparing, composing = comparing / _AGAIN, composing / _AGAIN
    scale = rollouts / count
    busiest = len(share_of([response] * rollouts, rank=0, world_size=world_size))
    return Judging(
        reading=(both - comparing) * scale,
        share=busiest / rollouts,
        comparing=comparing * scale,
        composing=composing * scale,
        trained=1 / replicas,
        received=rollouts * response,
    )


def _look_at(samples: Sequence[TrainSample]) -> None:
    """As microbatches do."""
    for sample in samples:
        for name in ("token_ids", "loss_mask", "region_ids", "rollout_log_probs"):
            getattr(sample, name)


def _cpu_seconds(of: Callable[[], _T]) -> tuple[float, _T]:
    started = time.process_time()
    result = of()
    return time.process_time() - started, result
