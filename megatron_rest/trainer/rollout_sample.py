"""Samples whose arrays are put together when somebody looks at them.

Every rank knows all rollouts of a step and deals them out by what is known of them without their samples' arrays:
lengths, tokens with loss, prompts, advantages.  Then it computes on a few.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from megatron_rest.types import Rollout, TrainSample

__all__ = ["RolloutSample"]


class RolloutSample(TrainSample):
    """A prompt and its rollout as a :class:`TrainSample`: prompt tokens are CONTEXT and carry no loss.

    Args:
        prompt: int32 [P]
        rollout: of R tokens.
        regions: int8 [R]
        carries_loss: False: no token does.
        marks: uint8 [R]
        earned: float64 [R], NaN where the reward says nothing of a token.
        advantage, sequence_id, group_id: as a TrainSample's.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        rollout: Rollout,
        *,
        regions: np.ndarray,
        advantage: float,
        sequence_id: int,
        group_id: int = -1,
        carries_loss: bool = True,
        marks: np.ndarray | None = None,
        earned: np.ndarray | None = None,
    ) -> None:
        for name, array in (("regions", regions), ("marks", marks), ("earned", earned)):
            if array is not None and len(array) != len(rollout.token_ids):
                raise ValueError(f"{name} of a rollout of {len(rollout.token_ids)} tokens has length {len(array)}")
        if not len(prompt) and rollout.loss_mask[0]:
            raise ValueError("the first token of a sequence has no predictor: a rollout needs a prompt before it")
        # The dataclass is frozen, and its arrays are the properties below.
        for name, value in (("advantage", advantage), ("sequence_id", sequence_id), ("group_id", group_id)):
            object.__setattr__(self, name, value)
        self.__dict__["_parts"] = (prompt, rollout, regions, carries_loss, marks, earned)

    @property
    def num_tokens(self) -> int:
        prompt, rollout, *_ = self._parts
        return len(prompt) + len(rollout.token_ids)

    @cached_property
    def num_loss_tokens(self) -> int:
        return int(np.count_nonzero(self._parts[1].loss_mask)) if self._parts[3] else 0

    @property
    def first_loss(self) -> int:
        prompt, rollout, _, carries_loss, *_ = self._parts
        first = int(rollout.loss_mask.argmax()) if carries_loss else 0
        return len(prompt) + first if carries_loss and rollout.loss_mask[first] else self.num_tokens

    def head(self, count: int) -> np.ndarray:
        prompt = self._parts[0]
        return prompt[:count] if count <= len(prompt) else self.token_ids[:count]

    @cached_property
    def token_ids(self) -> np.ndarray:
        return np.concatenate([self._parts[0], self._parts[1].token_ids], dtype=np.int32)

    @cached_property
    def loss_mask(self) -> np.ndarray:
        return self._behind(self._parts[1].loss_mask & self._parts[3], np.bool_)

    @cached_property
    def region_ids(self) -> np.ndarray:
        return self._behind(self._parts[2], np.int8)

    @cached_property
    def rollout_log_probs(self) -> np.ndarray:
        return self._behind(self._parts[1].log_probs, np.float32)

    @cached_property
    def marks(self) -> np.ndarray | None:
        marks = self._parts[4]
        return None if marks is None else self._behind(marks, np.uint8)

    @cached_property
    def token_rewards(self) -> np.ndarray | None:
        earned = self._parts[5]
        return None if earned is None else np.concatenate([np.full(len(self._parts[0]), np.nan), earned])

    _parts: tuple[np.ndarray, Rollout, np.ndarray, bool, np.ndarray | None, np.ndarray | None]

    def _behind(self, values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        """``values`` behind a 0 for every token of the prompt, copied once."""
        prompt = self._parts[0]
        whole = np.zeros(len(prompt) + len(values), dtype)
        whole[len(prompt) :] = values
        return whole
