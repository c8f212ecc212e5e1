"""Rollouts of every rank, on every rank, under their keys.

What an owner has goes to all once, as one flat tensor of bytes, nine a token (id, log-prob, and how much older than the
rollout's newest version the one is that sampled it): however many ranks there are, each receives the rollouts and
nothing else.  Nothing that a policy sampled is ever pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_rest.mcore.policy import Scores
from megatron_rest.types import MicroBatch, Rollout, StopReason, TrainSample

__all__ = [
    "all_gather_rollouts",
    "all_token_scores",
    "all_token_values",
    "pack_rollouts",
    "token_places",
    "token_versions",
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

    Where two ranks have the same key, the lower rank's counts.  Collectives over ``group``: one all-gather of a size,
    and a broadcast from every rank that has any, all under way together.
    """
    packed = pack_rollouts(mine)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([packed.numel() if mine else 0]), group=group)
    rank, owners = dist.get_rank(group), [owner for owner, size in enumerate(sizes) if int(size)]
    parts = [packed if owner == rank else torch.empty(int(sizes[owner]), dtype=torch.uint8) for owner in owners]
    works = [
        dist.broadcast(part, group=group, group_src=owner, async_op=True)
        for owner, part in zip(owners, parts, strict=True)
    ]
    rollouts: dict[int, Rollout] = {}
    for part, work in zip(parts, works, strict=True):
        assert work is not None  # every rank is in the group
        work.wait()
        rollouts = unpack_rollouts(part, prompt_ids) | rollouts
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


def token_versions(samples: Sequence[TrainSample], rollouts: Sequence[Rollout]) -> np.ndarray:
    """int32 ``[sum of lengths]``: the version that sampled each token of a step, 0 where nobody did; ``rollouts`` are
    those of ``samples``, in the same order.
    """
    versions = []
    for sample, rollout in zip(samples, rollouts, strict=True):
        prompt = np.zeros(sample.num_tokens - len(rollout.token_ids), np.int32)
        versions += [prompt, np.where(rollout.loss_mask, rollout.versions, 0).astype(np.int32)]
    return np.concatenate(versions)


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


def pack_rollouts(rollouts: Mapping[int, Rollout]) -> torch.Tensor:
    """Rollouts by key, without the names of their prompts; uint8, flat.

    How many there are, then five numbers of each (int64); rewards, log-probs (float32), token ids (int32), ages (one
    byte): by how many versions the weights that sampled a token are older than those of the last one, 255 if the policy
    has not sampled it.
    """
    parts = list(rollouts.values())
    header = [len(parts), *(number for key, rollout in rollouts.items() for number in _header(key, rollout))]
    rewards = [0.0 if rollout.reward is None else rollout.reward for rollout in parts]
    columns = [
        np.array(header, np.int64),
        np.array(rewards, np.float32),
        *(r.log_probs.astype(np.float32, copy=False) for r in parts),
        *(r.token_ids.astype(np.int32, copy=False) for r in parts),
        *(np.where(r.loss_mask, r.policy_version - r.versions, _NOT_SAMPLED).astype(np.uint8) for r in parts),
    ]
    return torch.from_numpy(np.concatenate([np.ascontiguousarray(column).view(np.uint8) for column in columns]))


_HEADER = 5  # integers a rollout
_NOT_SAMPLED = 255  # in the place of an age; rollout.max_staleness is less


def _header(key: int, rollout: Rollout) -> tuple[int, ...]:
    has_reward = rollout.reward is not None  # said by itself: no float has to mean "none"
    reason = _STOP_REASONS.index(rollout.stop_reason)
    return key, len(rollout.token_ids), reason, rollout.policy_version, int(has_reward)


def unpack_rollouts(packed: torch.Tensor, prompt_ids: Sequence[str] | Mapping[int, str]) -> dict[int, Rollout]:
    """Undo :func:`pack_rollouts`, given the name of the prompt of each key; arrays are views of ``packed``."""
    data, at = packed.numpy(), 0

    def take(count: int, dtype: type[np.generic]) -> np.ndarray:
        nonlocal at
        begin, at = at, at + count * np.dtype(dtype).itemsize
        return data[begin:at].view(dtype)

    total = int(take(1, np.int64)[0])
    headers = take(_HEADER * total, np.int64).reshape(total, _HEADER)
    bounds = np.cumsum([0, *headers[:, 1]])
    rewards, log_probs = take(total, np.float32), take(int(bounds[-1]), np.float32)
    token_ids, ages = take(int(bounds[-1]), np.int32), take(int(bounds[-1]), np.uint8)
    rollouts = {}
    for i, (key, _, reason, version, has_reward) in enumerate(headers.tolist()):
        of_rollout = slice(bounds[i], bounds[i + 1])
        rollouts[key] = Rollout(
            prompt_id=prompt_ids[key],
            token_ids=token_ids[of_rollout],
            log_probs=log_probs[of_rollout],
            loss_mask=ages[of_rollout] != _NOT_SAMPLED,
            stop_reason=_STOP_REASONS[reason],
            policy_version=version,
            reward=float(rewards[i]) if has_reward else None,
            versions=version - ages[of_rollout].astype(np.int32),
        )
    return rollouts
