"""What the trainer asks of a rollout engine, and how a rollout's seed is made.

An engine takes token ids and returns token ids with the log-probs they were sampled with; text is never re-tokenised.
 It knows which version of the policy it holds and refuses to sample while it holds none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_rest.types import PromptSample, RolloutGroup

__all__ = ["NO_WEIGHTS", "EngineStateError", "RolloutEngine", "rollout_seed"]

NO_WEIGHTS = -1
"""``policy_version`` of an engine with random or half-updated weights."""


class EngineStateError(RuntimeError):
    """The engine cannot be asked now: closed, or without valid weights."""


class RolloutEngine(Protocol):
    """Token in, token out.  All arrays are numpy, log-probs are float32 nats."""

    policy_version: int

    def generate(
        self, prompts: Sequence[PromptSample], *, rollouts_per_prompt: int, seed: int, max_response_tokens: int
    ) -> list[RolloutGroup]:
        """Sample ``rollouts_per_prompt`` siblings of every prompt; groups come back in the order of ``prompts``."""
        ...

    def greedy(self, token_ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``n`` most likely next tokens and their log-probs: ``(int32 [n], float32 [n])``."""
        ...

    def prompt_log_probs(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [L]: log-prob of ``token_ids[t]`` given what precedes it, at temperature 1; element 0 is 0."""
        ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self) -> None: ...

    def close(self) -> None: ...


def rollout_seed(seed: int, prompt_id: str, sibling: int, occurrence: int = 0) -> int:
    """63-bit seed of one rollout: the same whichever rank, batch or order serves it, different for every sibling.

    ``seed`` is the step's; ``occurrence`` counts the same prompt inside one call, so that a prompt drawn twice is not
    answered twice with the same words.
    """
    text = f"{seed}/{prompt_id}/{occurrence}/{sibling}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
