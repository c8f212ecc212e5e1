"""What the trainer asks of a rollout engine, and how a rollout's seed is made.

An engine takes token ids and returns token ids with the log-probs they were sampled with; text is never re-tokenised.
It knows which version of the policy it holds and refuses to sample while it holds none.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np

from megatron_rest.types import PromptSample, Rollout, RolloutGroup

__all__ = [
    "NO_WEIGHTS",
    "Cut",
    "EngineLostError",
    "EngineStateError",
    "Exam",
    "MoreRequests",
    "OnRollout",
    "RefusedRequestError",
    "RolloutEngine",
    "RolloutRequest",
    "as_groups",
    "make_requests",
    "part_seed",
    "rollout_seed",
    "turn_seed",
]

NO_WEIGHTS = -1
"""``policy_version`` of an engine with random or half-updated weights."""


class EngineStateError(RuntimeError):
    """The engine cannot be asked now: closed, asleep, or without valid weights."""


class EngineLostError(RuntimeError):
    """The engine's process died, failed or hung and was ended; what it had not handed over is to be sampled again."""


class RefusedRequestError(ValueError):
    """What was asked for cannot be done, and was not begun: the engine is as it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRequest:
    """One rollout to sample.  The seed is in it, so it gives the same rollout whoever samples it, and when."""

    key: int  # unique in the step: position of the prompt * rollouts_per_prompt + sibling
    prompt: PromptSample
    seed: int
    begun: Rollout | None = None  # the part of it that older weights have sampled


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """How a run answers that is judged and not trained on: the most likely token each time, whatever seed and sampling
    settings say.  Log-probs are 0, those of the one answer that this can give."""

    environment: str = ""  # as rollout.environment; empty = one answer a case
    max_turns: int = 1  # answers of one case in an environment


OnRollout = Callable[[int, Rollout], None]
"""Called with a request's key and its rollout as soon as that is complete."""


class Cut(Enum):
    """An answer of :data:`MoreRequests`."""

    NOW = "cut"


MoreRequests = Callable[[], "Sequence[RolloutRequest] | Cut | None"]
"""Asked again and again while an engine samples: what to take on besides; None = there will be no more; Cut.NOW = nor
is what runs to go on: it is handed over as far as it came, with ``StopReason.CUT``, unless it has no token yet."""


class RolloutEngine(Protocol):
    """Token in, token out.  All arrays are numpy, log-probs are float32 nats."""

    policy_version: int

    def arguments(self) -> dict[str, Any]:
        """What vLLM's engine was made with, as plain values."""
        ...

    def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_tokens: int,
        on_rollout: OnRollout,
        exam: Exam | None = None,
        more: MoreRequests | None = None,
    ) -> None:
        """Sample every request; each goes to ``on_rollout`` once, in the order in which they end.

        With ``exam`` they are answered greedily, with its environment in the place of the engine's own.  ``more`` is
        asked at least after every rollout, and the call returns when it has said None, or to cut, and all is handed
        over.  Raises EngineLostError when the engine goes; what was handed over before stays valid.
        """
        ...

    def greedy(self, token_ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``n`` most likely next tokens and their log-probs: ``(int32 [n], float32 [n])``."""
        ...

    def next_tokens(self, token_ids: Sequence[int] | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` likeliest tokens behind ``token_ids`` and their log-probs at temperature 1, likeliest first:
        ``(int32 [k], float32 [k])``."""
        ...

    def prompt_log_probs(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [L]: log-prob of ``token_ids[t]`` given what precedes it, at temperature 1; element 0 is 0."""
        ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self) -> None: ...

    def sleep(self) -> None:
        """Give accelerator memory back until :meth:`wake_up`; does nothing with ``rollout.sleep_level`` 0."""
        ...

    def wake_up(self) -> None: ...

    def close(self) -> None: ...


def make_requests(prompts: Sequence[PromptSample], *, rollouts_per_prompt: int, seed: int) -> list[RolloutRequest]:
    """``rollouts_per_prompt`` siblings of every prompt, prompts in order; ``seed`` is the step's."""
    occurrences: Counter[str] = Counter()
    requests: list[RolloutRequest] = []
    for prompt in prompts:
        for sibling in range(rollouts_per_prompt):
            own = rollout_seed(seed, prompt.prompt_id, sibling, occurrences[prompt.prompt_id])
            requests.append(RolloutRequest(key=len(requests), prompt=prompt, seed=own))
        occurrences[prompt.prompt_id] += 1
    return requests


def as_groups(requests: Sequence[RolloutRequest], rollouts: Mapping[int, Rollout], size: int) -> list[RolloutGroup]:
    """Groups of ``size`` siblings in the order of ``requests``; KeyError if one is missing."""
    return [
        RolloutGroup(
            prompt=requests[first].prompt,
            rollouts=tuple(rollouts[request.key] for request in requests[first : first + size]),
        )
        for first in range(0, len(requests), size)
    ]


def rollout_seed(seed: int, prompt_id: str, sibling: int, occurrence: int = 0) -> int:
    """63-bit seed of one rollout: the same whichever rank, batch or order serves it, different for every sibling.

    ``seed`` is the step's; ``occurrence`` counts the same prompt inside one step, so that a prompt drawn twice is not
    answered twice with the same words.
    """
    text = f"{seed}/{prompt_id}/{occurrence}/{sibling}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def turn_seed(seed: int, turn: int) -> int:
    """Seed of one turn of a rollout; the first turn's is the rollout's own."""
    return seed if turn == 0 else rollout_seed(seed, "turn", turn)


def part_seed(seed: int, num_tokens: int) -> int:
    """Seed of what follows ``num_tokens`` of a turn that was cut: the random numbers before it are used up."""
    return seed if num_tokens == 0 else rollout_seed(seed, "part", num_tokens)
