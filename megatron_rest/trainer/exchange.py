"""Rollouts of every rank, on every rank, in prompt order.

Engine i of n rolls out prompts i, i + n, i + 2 n, ...  What an owner has goes to all once, as one flat tensor of bytes,
nine a token: however many ranks there are, each receives the rollouts and nothing else.  Nothing that a policy sampled
is ever pickled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_rest.mcore.policy import Scores
from megatron_rest.types import MicroBatch, PromptSample, Rollout, RolloutGroup, StopReason

__all__ = [
    "all_gather_groups",
    "all_token_scores",
    "all_token_values",
    "pack_groups",
    "token_places",
    "unpack_groups",
]

_STOP_REASONS = tuple(StopReason)


def all_gather_groups(
    mine: Sequence[RolloutGroup],
    prompts: Sequence[PromptSample],
    *,
    owners: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> list[RolloutGroup]:
    """All groups in the order of ``prompts``.

    Args:
        mine: groups of ``prompts[i :: len(owners)]`` on the rank ``owners[i]``, in that order; none on other ranks.
        prompts: of the step.
        owners: rank of each engine.
        group: None = all ranks.

    Collectives over ``group``: one all-gather of a size, and a broadcast from every owner, all under way together.
    """
    packed = pack_groups(mine)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([packed.numel()]), group=group)
    rank = dist.get_rank(group)
    parts = [packed if owner == rank else torch.empty(int(sizes[owner]), dtype=torch.uint8) for owner in owners]
    works = [
        dist.broadcast(part, group=group, group_src=owner, async_op=True)
        for owner, part in zip(owners, parts, strict=True)
    ]
    groups: list[RolloutGroup | None] = [None] * len(prompts)
    for engine, (part, work) in enumerate(zip(parts, works, strict=True)):
        assert work is not None  # every rank is in the group
        work.wait()
        theirs = list(range(engine, len(prompts), len(owners)))
        for index, rollout_group in zip(theirs, unpack_groups(part, [prompts[i] for i in theirs]), strict=True):
            groups[index] = rollout_group
    return [g for g in groups if g is not None]


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


def pack_groups(groups: Sequence[RolloutGroup]) -> torch.Tensor:
    """All there is to say about ``groups`` but their prompts; uint8, flat.

    Rollouts a group, then four numbers a rollout (int64); rewards, log-probs (float32), token ids (int32), masks (one
    byte).
    """
    rollouts = [r for g in groups for r in g.rollouts]
    header = [len(g.rollouts) for g in groups] + [number for r in rollouts for number in _header(r)]
    rewards = [0.0 if r.reward is None else r.reward for r in rollouts]
    parts = [
        np.array(header, np.int64),
        np.array(rewards, np.float32),
        *(r.log_probs.astype(np.float32, copy=False) for r in rollouts),
        *(r.token_ids.astype(np.int32, copy=False) for r in rollouts),
        *(r.loss_mask.astype(np.uint8, copy=False) for r in rollouts),
    ]
    return torch.from_numpy(np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts]))


_HEADER = 4  # integers a rollout


def _header(rollout: Rollout) -> tuple[int, int, int, int]:
    has_reward = rollout.reward is not None  # said by itself: no float has to mean "none"
    return len(rollout.token_ids), _STOP_REASONS.index(rollout.stop_reason), rollout.policy_version, int(has_reward)


def unpack_groups(packed: torch.Tensor, prompts: Sequence[PromptSample]) -> list[RolloutGroup]:
    """Undo :func:`pack_groups`, given the prompts of the groups in their order; arrays are views of ``packed``."""
    data, at = packed.numpy(), 0

    def take(count: int, dtype: type[np.generic]) -> np.ndarray:
        nonlocal at
        begin, at = at, at + count * np.dtype(dtype).itemsize
        return data[begin:at].view(dtype)

    sizes = take(len(prompts), np.int64)
    total = int(sizes.sum())
    headers = take(_HEADER * total, np.int64).reshape(total, _HEADER)
    bounds = np.cumsum([0, *headers[:, 0]])
    rewards, log_probs = take(total, np.float32), take(int(bounds[-1]), np.float32)
    token_ids, masks = take(int(bounds[-1]), np.int32), take(int(bounds[-1]), np.uint8)
    rollouts = iter(range(total))
    groups = []
    for prompt, size in zip(prompts, sizes, strict=True):
        members = []
        for _ in range(int(size)):
            i = next(rollouts)
            of_rollout = slice(bounds[i], bounds[i + 1])
            members.append(
                Rollout(
                    prompt_id=prompt.prompt_id,
                    token_ids=token_ids[of_rollout],
                    log_probs=log_probs[of_rollout],
                    loss_mask=masks[of_rollout].astype(bool),
                    stop_reason=_STOP_REASONS[int(headers[i, 1])],
                    policy_version=int(headers[i, 2]),
                    reward=float(rewards[i]) if headers[i, 3] else None,
                )
            )
        groups.append(RolloutGroup(prompt=prompt, rollouts=tuple(members)))
    return groups
