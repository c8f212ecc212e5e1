"""Rollouts of every rank, on every rank, under their keys.

Token ids and log-probs travel as flat tensors: nothing that a policy sampled is ever pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_rest.mcore.policy import Scores
from megatron_rest.types import MicroBatch, PromptSample, Rollout, RolloutGroup, StopReason

__all__ = [
    "all_gather_rollouts",
    "all_token_scores",
    "all_token_values",
    "pack_groups",
    "pack_rollouts",
    "token_places",
    "unpack_groups",
    "unpack_rollouts",
]

_STOP_REASONS = tuple(StopReason)


def all_gather_rollouts(
    mine: Mapping[int, Rollout], prompt_ids: Sequence[str], *, group: dist.ProcessGroup | None = None
) -> dict[int, Rollout]:
    """The rollouts of all ranks, the same on every rank.

    Args:
        mine: what this rank has, by key.
        prompt_ids: of the rollout with key 0, 1, ...
        group: None = all ranks.

    Where two ranks have the same key, the lower rank's counts.  Collectives: two all-gathers (integers; log-probs and
    rewards) over ``group``, each with one of its sizes.
    """
    integers, floats = pack_rollouts(mine)
    gathered = zip(_all_gather(integers, group), _all_gather(floats, group), strict=True)
    rollouts: dict[int, Rollout] = {}
    for packed in gathered:
        rollouts = unpack_rollouts(*packed, prompt_ids) | rollouts
    return rollouts


def all_token_scores(
    lengths: Sequence[int],
    microbatches: Sequence[MicroBatch],
    scores: Sequence[Scores],
    *,
    dp_group: dist.ProcessGroup,
    with_advantages: bool = False,
) -> dict[str, np.ndarray]:
    """``old_log_probs``, ``entropy``, ``token_weights`` and, if measured, ``beta`` of all sequences of a step.

    Args:
        lengths: tokens of every sequence, in the order of their ``sequence_id`` 0, 1, ...
        microbatches: this replica's, with ``token_weights`` (None counts as 1).
        scores: of the same microbatches; all with beta or all without.
        dp_group: replicas that hold the other sequences.
        with_advantages: ``token_advantages``, too.

    Returns:
        float32 ``[sum(lengths)]`` each, index t for token t itself, 0 where there is no loss; equal on all replicas.

    Collectives: one SUM all-reduce of ``[3 to 5, sum(lengths)]`` float32 over ``dp_group``; it adds zeros to the
        one value of each token, so nothing is rounded.
    """
    with_beta = any(score.beta is not None for score in scores)
    columns = []
    for microbatch, score in zip(microbatches, scores, strict=True):
        mask = microbatch.loss_mask
        count = int(mask.sum())
        weights = torch.ones(count) if microbatch.token_weights is None else microbatch.token_weights[mask]
        values = [score.log_probs.cpu()[mask], score.entropy.cpu()[mask], weights]
        if with_beta:
            values.append(torch.zeros(count) if score.beta is None else score.beta.cpu()[mask])
        if with_advantages:
            values.append(microbatch.advantages[mask])
        columns.append(torch.stack(values))
    names = ["old_log_probs", "entropy", "token_weights"]
    names += ["beta"] if with_beta else []
    names += ["token_advantages"] if with_advantages else []
    table = all_token_values(lengths, microbatches, columns, dp_group=dp_group, size=len(names))
    return dict(zip(names, table.numpy(), strict=True))


def token_places(lengths: Sequence[int], microbatch: MicroBatch) -> torch.Tensor:
    """int64: where the loss tokens of ``microbatch`` lie among all tokens of the step.

    ``lengths`` are those of all sequences, in the order of their ``sequence_id`` 0, 1, ...
    """
    starts = torch.from_numpy(np.cumsum([0, *lengths[:-1]]))
    # Position p of a sequence speaks of its token p + 1.
    return (starts[microbatch.sequence_ids.clamp_min(0)] + microbatch.position_ids + 1)[microbatch.loss_mask]


def all_token_values(
    lengths: Sequence[int],
    microbatches: Sequence[MicroBatch],
    columns: Sequence[torch.Tensor],
    *,
    dp_group: dist.ProcessGroup | None,
    size: int | None = None,
) -> torch.Tensor:
    """float32 ``[k, sum(lengths)]``: values of all loss tokens of a step, 0 elsewhere; equal on all replicas.

    Args:
        lengths: tokens of every sequence, in the order of their ``sequence_id`` 0, 1, ...
        microbatches: this replica's.
        columns: float32 ``[k, loss tokens]`` of each.
        dp_group: replicas that hold the other sequences; None: there is one, and nothing is sent.
        size: k, where there may be no microbatch.

    Collectives: one SUM all-reduce over ``dp_group``; it adds zeros to the one value of each token, so nothing is
        rounded.
    """
    table = torch.zeros(len(columns[0]) if size is None else size, sum(lengths))
    for microbatch, values in zip(microbatches, columns, strict=True):
        table[:, token_places(lengths, microbatch)] = values
    if dp_group is not None:
        dist.all_reduce(table, group=dp_group)
    return table


def pack_groups(groups: Sequence[RolloutGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """All there is to say about ``groups``, of one size, but their prompts: int64 and float32, flat."""
    return pack_rollouts(dict(enumerate(rollout for group in groups for rollout in group.rollouts)))


def unpack_groups(integers: torch.Tensor, floats: torch.Tensor, prompts: Sequence[PromptSample]) -> list[RolloutGroup]:
    """Undo :func:`pack_groups`, given the prompts of the groups in their order."""
    size = int(integers[0]) // max(len(prompts), 1)
    rollouts = unpack_rollouts(integers, floats, [prompt.prompt_id for prompt in prompts for _ in range(size)])
    return [
        RolloutGroup(prompt=prompt, rollouts=tuple(rollouts[i * size + sibling] for sibling in range(size)))
        for i, prompt in enumerate(prompts)
    ]


def pack_rollouts(rollouts: Mapping[int, Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rollouts by key, without the names of their prompts: int64 and float32, flat.

    integers: how many; key, length, stop reason, version, has a reward, of each; token ids; loss masks
    floats:   rewards; log-probs
    """
    parts = list(rollouts.values())
    integers = np.concatenate(
        [
            np.array([len(rollouts)], np.int64),
            np.array([x for key, rollout in rollouts.items() for x in _header(key, rollout)], np.int64),
            *(rollout.token_ids.astype(np.int64) for rollout in parts),
            *(rollout.loss_mask.astype(np.int64) for rollout in parts),
        ]
    )
    rewards = np.array([0.0 if rollout.reward is None else rollout.reward for rollout in parts], np.float32)
    floats = np.concatenate([rewards, *(rollout.log_probs for rollout in parts)]).astype(np.float32)
    return torch.from_numpy(integers), torch.from_numpy(floats)


_HEADER = 5  # integers a rollout


def _header(key: int, rollout: Rollout) -> tuple[int, ...]:
    has_reward = rollout.reward is not None  # said by itself: no float has to mean "none"
    reason = _STOP_REASONS.index(rollout.stop_reason)
    return key, len(rollout.token_ids), reason, rollout.policy_version, int(has_reward)


def unpack_rollouts(
    packed_integers: torch.Tensor, packed_floats: torch.Tensor, prompt_ids: Sequence[str]
) -> dict[int, Rollout]:
    """Undo :func:`pack_rollouts`, given the name of the prompt of each key."""
    integers, floats = packed_integers.numpy(), packed_floats.numpy()
    total = int(integers[0])
    headers = integers[1 : 1 + _HEADER * total].reshape(total, _HEADER)
    bounds = np.cumsum([0, *headers[:, 1]])
    tokens = integers[1 + _HEADER * total :]
    masks = tokens[bounds[-1] :]
    rewards, log_probs = floats[:total], floats[total:]
    rollouts = {}
    for i, (key, _, reason, version, has_reward) in enumerate(headers.tolist()):
        at = slice(bounds[i], bounds[i + 1])
        rollouts[key] = Rollout(
            prompt_id=prompt_ids[key],
            token_ids=tokens[at].astype(np.int32),
            log_probs=log_probs[at].copy(),
            loss_mask=masks[at].astype(bool),
            stop_reason=_STOP_REASONS[reason],
            policy_version=version,
            reward=float(rewards[i]) if has_reward else None,
        )
    return rollouts


def _all_gather(mine: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """All-gather of 1-D tensors of different lengths."""
    world_size = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=mine.dtype)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded, group=group)
    return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]
