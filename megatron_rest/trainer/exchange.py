"""Rollouts of every rank, on every rank, in prompt order.

Engine i of n rolls out prompts i, i + n, i + 2 n, ...  Token ids and log-probs travel as flat tensors: nothing that a
policy sampled is ever pickled.
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

    Collectives: two all-gathers (integers; log-probs and rewards) over ``group``, each with one of its sizes.
    """
    integers, floats = pack_groups(mine)
    all_integers = _all_gather(integers, group)
    all_floats = _all_gather(floats, group)
    groups: list[RolloutGroup | None] = [None] * len(prompts)
    for engine, rank in enumerate(owners):
        theirs = list(range(engine, len(prompts), len(owners)))
        unpacked = unpack_groups(all_integers[rank], all_floats[rank], [prompts[i] for i in theirs])
        for index, rollout_group in zip(theirs, unpacked, strict=True):
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


def pack_groups(groups: Sequence[RolloutGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """All there is to say about ``groups`` but their prompts: int64 and float32, flat."""
    rollouts = [r for g in groups for r in g.rollouts]
    header = [[len(g.rollouts) for g in groups], [x for r in rollouts for x in _header(r)]]
    integers = np.concatenate(
        [np.array(part, np.int64) for part in header] + [r.token_ids.astype(np.int64) for r in rollouts]
        + [r.loss_mask.astype(np.int64) for r in rollouts]
    )  # fmt: skip
    rewards = np.array([0.0 if r.reward is None else r.reward for r in rollouts], np.float32)
    floats = np.concatenate([rewards, *(r.log_probs for r in rollouts)]).astype(np.float32)
    return torch.from_numpy(integers), torch.from_numpy(floats)


_HEADER = 4  # integers a rollout


def _header(rollout: Rollout) -> tuple[int, int, int, int]:
    has_reward = rollout.reward is not None  # said by itself: no float has to mean "none"
    return len(rollout.token_ids), _STOP_REASONS.index(rollout.stop_reason), rollout.policy_version, int(has_reward)


def unpack_groups(
    packed_integers: torch.Tensor, packed_floats: torch.Tensor, prompts: Sequence[PromptSample]
) -> list[RolloutGroup]:
    """Undo :func:`pack_groups`, given the prompts of the groups in their order."""
    integers, floats = packed_integers.numpy(), packed_floats.numpy()
    sizes = integers[: len(prompts)]
    total = int(sizes.sum())
    headers = integers[len(prompts) : len(prompts) + _HEADER * total].reshape(total, _HEADER)
    bounds = np.cumsum([0, *headers[:, 0]])
    tokens = integers[len(prompts) + _HEADER * total :]
    masks = tokens[bounds[-1] :]
    rewards, log_probs = floats[:total], floats[total:]
    rollouts = iter(range(total))
    groups = []
    for prompt, size in zip(prompts, sizes, strict=True):
        members = []
        for _ in range(int(size)):
            i = next(rollouts)
            at = slice(bounds[i], bounds[i + 1])
            members.append(
                Rollout(
                    prompt_id=prompt.prompt_id,
                    token_ids=tokens[at].astype(np.int32),
                    log_probs=log_probs[at].copy(),
                    loss_mask=masks[at].astype(bool),
                    stop_reason=_STOP_REASONS[int(headers[i, 1])],
                    policy_version=int(headers[i, 2]),
                    reward=float(rewards[i]) if headers[i, 3] else None,
                )
            )
        groups.append(RolloutGroup(prompt=prompt, rollouts=tuple(members)))
    return groups


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
