"""What a run is besides Megatron's model, optimiser and schedule: the part of a checkpoint that the trainer owns.

What is a pure function of configuration and step is not in it: the curriculum's progress, the order of the data, the
seeds of the samplers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rest.trainer.exchange import pack_rollouts, unpack_rollouts
from megatron_rest.types import PromptSample, Rollout

__all__ = ["RunState", "prompt_names"]

_ROLLOUTS = "rollouts_by_token"
_FURTHEST = 1 << 32  # more than a step has rollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """State after a step, in memory as it is used; :meth:`as_extra` is plain data."""

    weighting: Mapping[str, Any]  # moving averages of the measuring weight sources
    num_restarts: int  # engines started again so far
    skipped_in_a_row: int  # updates whose loss or gradients were not finite
    next_prompts: tuple[tuple[str, ...], ...]  # ids of the prompts of each step that may be under way, the next one
    # first: so that other data or another seed is noticed
    group_size: int  # siblings of each prompt in ``queue``
    queue: Sequence[Mapping[int, Rollout]] | None  # rollouts of those steps by their keys, whole or cut; None: they are
    # sampled when their step begins, or come by CheckpointWriter.complete

    def as_extra(self) -> dict[str, Any]:
        """For ``CheckpointWriter.save``: numbers, strings and tensors."""
        return {
            "weighting": dict(self.weighting),
            "num_restarts": self.num_restarts,
            "skipped_in_a_row": self.skipped_in_a_row,
            "next_prompts": [list(names) for names in self.next_prompts],
            "group_size": self.group_size,
            "queue": None if self.queue is None else {_ROLLOUTS: _pack(self.queue)},
        }

    @staticmethod
    def queue_tensors(queue: Sequence[Mapping[int, Rollout]]) -> dict[str, torch.Tensor]:
        """``queue`` alone, for ``CheckpointWriter.complete``."""
        return {f"queue.{_ROLLOUTS}": _pack(queue)}

    @classmethod
    def of_extra(
        cls, extra: Mapping[str, Any], prompts: Sequence[Sequence[PromptSample]], *, group_size: int
    ) -> RunState:
        """Undo :meth:`as_extra`; ``prompts`` are those of the next step and of later ones that may be under way.

        What was sampled for other prompts, or in groups of another size, is dropped, and with it all that comes later.
        """
        saved = tuple(tuple(names) for names in extra["next_prompts"])
        same = 0
        for theirs, ours in zip(saved, prompt_names(prompts), strict=False):
            if theirs != ours:
                break
            same += 1
        packed, saved_size = (extra["queue"] or {}).get(_ROLLOUTS), int(extra.get("group_size", 0))
        return cls(
            weighting=extra["weighting"],
            num_restarts=int(extra["num_restarts"]),
            skipped_in_a_row=int(extra["skipped_in_a_row"]),
            next_prompts=saved,
            group_size=saved_size,
            queue=_unpack(packed, saved, saved_size)[:same]
            if packed is not None and saved_size == group_size
            else None,
        )


def prompt_names(prompts: Sequence[Sequence[PromptSample]]) -> tuple[tuple[str, ...], ...]:
    """Ids of the prompts of each step."""
    return tuple(tuple(prompt.prompt_id for prompt in of_step) for of_step in prompts)


def _pack(queue: Sequence[Mapping[int, Rollout]]) -> torch.Tensor:
    return pack_rollouts({i * _FURTHEST + key: r for i, known in enumerate(queue) for key, r in known.items()})


def _unpack(packed: torch.Tensor, names: Sequence[Sequence[str]], group_size: int) -> list[dict[int, Rollout]]:
    ids = {
        i * _FURTHEST + place * group_size + sibling: name
        for i, of_step in enumerate(names)
        for place, name in enumerate(of_step)
        for sibling in range(group_size)
    }
    queue: list[dict[int, Rollout]] = [{} for _ in names]
    for key, rollout in unpack_rollouts(packed, ids).items():
        queue[key // _FURTHEST][key % _FURTHEST] = rollout
    return queue
