"""What a run is besides Megatron's model, optimiser and schedule: the part of a checkpoint that the trainer owns.

What is a pure function of configuration and step is not in it: the curriculum's progress, the order of the data, the
seeds of the samplers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rest.trainer.exchange import pack_groups, unpack_groups
from megatron_rest.types import PromptSample, RolloutGroup

__all__ = ["RunState"]

_ROLLOUTS = "rollouts"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """State after a step, in memory as it is used; :meth:`as_extra` is plain data."""

    weighting: Mapping[str, Any]  # moving averages of the measuring weight sources
    num_restarts: int  # engines started again so far
    skipped_in_a_row: int  # updates whose loss or gradients were not finite
    next_prompts: tuple[str, ...]  # ids of the next step's prompts, so that other data or another seed is noticed
    queue: list[RolloutGroup] | None  # rollouts of the next step, where they are sampled before their step begins

    def as_extra(self) -> dict[str, Any]:
        """For ``CheckpointWriter.save``: numbers, strings and tensors."""
        return {
            "weighting": dict(self.weighting),
            "num_restarts": self.num_restarts,
            "skipped_in_a_row": self.skipped_in_a_row,
            "next_prompts": list(self.next_prompts),
            "queue": None if self.queue is None else {_ROLLOUTS: pack_groups(self.queue)},
        }

    @staticmethod
    def queue_tensors(groups: Sequence[RolloutGroup]) -> dict[str, torch.Tensor]:
        """``queue`` alone, for ``CheckpointWriter.complete``."""
        return {f"queue.{_ROLLOUTS}": pack_groups(groups)}

    @classmethod
    def of_extra(cls, extra: Mapping[str, Any], prompts: Sequence[PromptSample]) -> RunState:
        """Undo :meth:`as_extra`; ``prompts`` are the next step's.  A queue of other prompts is dropped."""
        next_prompts = tuple(extra["next_prompts"])
        queue = None
        if extra["queue"] is not None and next_prompts == tuple(prompt.prompt_id for prompt in prompts):
            queue = unpack_groups(extra["queue"][_ROLLOUTS], prompts)
        return cls(
            weighting=extra["weighting"],
            num_restarts=int(extra["num_restarts"]),
            skipped_in_a_row=int(extra["skipped_in_a_row"]),
            next_prompts=next_prompts,
            queue=queue,
        )
