"""The data carried through one RL step: frozen, keyword-only, checked on construction.

    PromptSample -> RolloutGroup(Rollout) -> TrainSample -> TrainBatch(MicroBatch) -> LossInputs -> LossOutput

One alignment rule holds everywhere after ``data/batching.py``: index ``t`` of every ``[T]`` tensor of a
:class:`MicroBatch` or of :class:`LossInputs` speaks of ``labels[t] = token_ids[t + 1]``.  Before it (``Rollout``,
``TrainSample``) index ``t`` speaks of ``token_ids[t]`` itself.  The shift happens once, there.

Host-side sequences are numpy arrays (they are built, split and shipped between processes); what a model sees is torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntFlag, StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rest.packing_report import PackingReport
from megatron_rest.reward_output import RewardOutput
from megatron_rest.token_region import TokenRegion

__all__ = [
    "BatchTotals",
    "LossInputs",
    "LossOutput",
    "MicroBatch",
    "PackingReport",
    "PromptSample",
    "RewardOutput",
    "Rollout",
    "RolloutGroup",
    "StepReport",
    "StopReason",
    "TokenRegion",
    "TrainBatch",
    "TrainSample",
    "TurnMark",
]


class StopReason(StrEnum):
    """Why a rollout ended.  Expected failures are data, not exceptions."""

    EOS = "eos"  # the policy ended its turn, and no environment goes on
    LENGTH = "length"  # max_response_tokens reached, tool outputs included
    CONTEXT = "context"  # the model's context is full
    ABORTED = "aborted"  # the engine gave the request up
    TURNS = "turns"  # rollout.max_turns answers, and the environment would go on
    TOOL_TIMEOUT = "tool_timeout"  # the environment did not answer within rollout.tool_timeout_seconds
    TOOL_FAILED = "tool_failed"  # the environment itself raised (an error that a tool reports is a tool output)
    CUT = "cut"  # new weights came before its end (rollout.on_update=keep), and go on with it: nobody trains on it yet

    @property
    def is_infrastructure(self) -> bool:
        """Whether something else than the policy ended it: such a rollout carries no loss, and no sibling is compared
        with it.
        """
        return self in (StopReason.ABORTED, StopReason.TOOL_TIMEOUT, StopReason.TOOL_FAILED)


class TurnMark(IntFlag):
    """What is wrong in form with a turn, by its dialect's reader."""

    CALLS = 1  # a call section that cannot be read, or that never closes
    THOUGHT = 2  # a thought that never closes


def _same_length(owner: str, expected: int, **arrays: np.ndarray | Tensor | None) -> None:
    for name, array in arrays.items():
        if array is not None and len(array) != expected:
            raise ValueError(f"{owner}.{name} has length {len(array)}, expected {expected} like token_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSample:
    """One prompt with its reference answer, already tokenised."""

    prompt_id: str  # stable over runs: content hash of the row
    token_ids: np.ndarray  # int32 [P], chat template applied, generation prompt included
    ground_truth: str  # reference answer text; parsed by the reward, never executed
    index: int = -1  # row in the data set it came from
    messages_json: str = "[]"  # of the prompt: [{"role", "content"}]
    tools_json: str = "[]"  # [{"name", "description", "parameters"}]
    metadata_json: str = "{}"  # columns of the row that are part of neither prompt nor reference

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as it was written before the chat template."""
        return list(json.loads(self.messages_json))

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Tools with their JSON schemas."""
        return list(json.loads(self.tools_json))

    @property
    def metadata(self) -> dict[str, Any]:
        """What else the row brought, by column."""
        return dict(json.loads(self.metadata_json))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled sequence.  Index t of every array speaks of ``token_ids[t]`` (response tokens only)."""

    prompt_id: str
    token_ids: np.ndarray  # int32 [R] sampled ids, the end-of-turn token included; tool outputs appended as tokens
    log_probs: np.ndarray  # float32 [R] log-prob under the sampling distribution, nats; 0 where loss_mask is False
    loss_mask: np.ndarray  # bool [R] True where the policy sampled the token
    stop_reason: StopReason
    policy_version: int  # weights that sampled its last token
    reward: float | None = None  # what its environment gave; None: judged from the text
    versions: np.ndarray = None  # type: ignore[assignment]  # int32 [R] weights that sampled each token; None: the same

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if n == 0:
            raise ValueError(f"rollout of prompt {self.prompt_id} is empty: a policy samples at least one token")
        versions = np.full(n, self.policy_version, np.int32)
        if self.versions is not None:
            _same_length("Rollout", n, versions=self.versions)
            # What nobody sampled has no version of its own.
            versions = np.where(self.loss_mask, self.versions, versions).astype(np.int32)
            if int(versions.max()) > self.policy_version:
                raise ValueError(
                    f"rollout of prompt {self.prompt_id} has tokens of version {versions.max()}, and its last "
                    f"token is of policy_version {self.policy_version}: none is newer"
                )
        object.__setattr__(self, "versions", versions)
        _same_length("Rollout", n, log_probs=self.log_probs, loss_mask=self.loss_mask)

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled its tokens."""
        return int(self.versions.min())

    @property
    def is_whole(self) -> bool:
        """Whether it has ended."""
        return self.stop_reason is not StopReason.CUT


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """The siblings of one prompt: what group-relative advantages are computed over."""

    prompt: PromptSample
    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        wrong = {r.prompt_id for r in self.rollouts} - {self.prompt.prompt_id}
        if wrong:
            raise ValueError(f"group of prompt {self.prompt.prompt_id} holds rollouts of {sorted(wrong)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSample:
    """Prompt and response of one rollout as the trainer sees it.  Index t speaks of ``token_ids[t]``."""

    token_ids: np.ndarray  # int32 [L], prompt then response
    loss_mask: np.ndarray  # bool [L]
    region_ids: np.ndarray  # int8 [L], TokenRegion
    rollout_log_probs: np.ndarray  # float32 [L], 0 outside the mask
    advantage: float
    sequence_id: int  # unique in the step
    group_id: int = -1  # samples of one group begin with the same prompt; -1: of none
    marks: np.ndarray | None = None  # uint8 [L], TurnMark of the token's turn; None: turns were not looked at
    # float64 [L], what the reward says single tokens earned, a part of the rollout's; NaN: nothing; None: of no token
    token_rewards: np.ndarray | None = None

    def __post_init__(self) -> None:
        _same_length(
            "TrainSample",
            len(self.token_ids),
            loss_mask=self.loss_mask,
            region_ids=self.region_ids,
            rollout_log_probs=self.rollout_log_probs,
            marks=self.marks,
            token_rewards=self.token_rewards,
        )
        if self.loss_mask[0]:
            raise ValueError("the first token of a sequence has no predictor: loss_mask[0] must be False")

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))

    @property
    def first_loss(self) -> int:
        """Index of the first token with loss; ``num_tokens`` where none has."""
        first = int(self.loss_mask.argmax())
        return first if self.loss_mask[first] else self.num_tokens

    def head(self, count: int) -> np.ndarray:
        """int32 ``[count]``: the first tokens."""
        return self.token_ids[:count]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTotals:
    """Denominators of one optimiser step: over all microbatches, data- and context-parallel ranks.

    Known before the first forward pass, so that no split of the work changes loss or gradient.
    """

    num_tokens: float  # tokens with loss_mask True
    num_sequences: float  # sequences with at least one such token
    weight_sum: float  # sum of token_weights over those tokens (= num_tokens for uniform weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Packed sequences [T] of one pipeline microbatch (batch dimension 1, Megatron's THD layout).

    Sequence ``i`` occupies ``cu_seqlens[i]:cu_seqlens[i + 1]``; padding positions have label 0 and loss_mask False.
    Padding that fills up a sequence comes after its tokens, where a causal model cannot see it, and belongs to no
    sequence in ``sequence_ids``.

    With ``parents`` these are segments, some of which continue others: segment ``i`` sees itself up to each row, and
    all of segment ``parents[i]``, which lies before it, and of those that one continues.  A prompt is there once, its
    answers continue it.  What is continued has no loss and belongs to no sequence; ``position_ids`` are those of the
    whole sequence.

    With ``cp_size`` > 1 the tensors hold one context-parallel rank's tokens (``mcore/context_parallel.py`` cuts them),
    and ``cu_seqlens`` still the bounds of the whole sequences.
    """

    token_ids: Tensor  # int64 [T]
    labels: Tensor  # int64 [T], labels[t] = token_ids[t + 1] inside a sequence
    position_ids: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int32 [S + 1]
    loss_mask: Tensor  # bool [T]
    region_ids: Tensor  # int64 [T], region of labels[t]
    sequence_ids: Tensor  # int64 [T], TrainSample.sequence_id of labels[t], -1 on padding
    sequence_lengths: Tensor  # float32 [T], number of loss tokens of the sequence that t belongs to (1 on padding)
    advantages: Tensor  # float32 [T]
    rollout_log_probs: Tensor  # float32 [T]
    old_log_probs: Tensor | None = None  # float32 [T], from the scoring pass
    token_weights: Tensor | None = None  # float32 [T]; None = uniform
    ref_log_probs: Tensor | None = None  # float32 [T], of the reference policy, where there is one
    parents: Tensor | None = None  # int64 [S] on the CPU: the segment that each one continues, or -1; None: none does
    left_out_tokens: int = 0  # loss tokens that count in this microbatch's share of the denominator, but are not here
    cp_size: int = 1  # ranks that share every sequence
    bounds: tuple[int, ...] = ()  # cu_seqlens on the host; made here, before a device has to be asked
    active_rows: Tensor | None = (
        None  # int64 on the CPU: where loss_mask is True; made here, so that no device is asked
    )

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if self.loss_mask.device.type == "cpu":  # always anew, so that a part of a microbatch lists its own rows
            object.__setattr__(self, "active_rows", self.loss_mask.nonzero()[:, 0])
        if self.cu_seqlens.device.type == "cpu" or not self.bounds:
            object.__setattr__(self, "bounds", tuple(self.cu_seqlens.tolist()))
        for name in (
            "labels",
            "position_ids",
            "loss_mask",
            "region_ids",
            "sequence_ids",
            "sequence_lengths",
            "advantages",
            "rollout_log_probs",
            "old_log_probs",
            "token_weights",
            "ref_log_probs",
        ):
            _same_length("MicroBatch", n, **{name: getattr(self, name)})
        if self.bounds[-1] != n * self.cp_size:
            raise ValueError(
                f"MicroBatch.cu_seqlens ends at {self.bounds[-1]}, but there are {n * self.cp_size} tokens"
            )
        if self.parents is not None:
            self._check_parents(self.parents.tolist())

    def _check_parents(self, parents: list[int]) -> None:
        if len(parents) != self.num_sequences or any(not -1 <= parent < i for i, parent in enumerate(parents)):
            raise ValueError(
                f"MicroBatch.parents {parents} are not one earlier segment, or -1, for each of {self.num_sequences}"
            )
        if self.cp_size == 1 and self.loss_mask.device.type == "cpu":
            continued = {parent for parent in parents if parent >= 0}
            if any(self.loss_mask[self.bounds[i] : self.bounds[i + 1]].any() for i in continued):
                raise ValueError("MicroBatch.parents: a segment that others continue carries loss: whose would it be?")

    @property
    def num_sequences(self) -> int:
        return len(self.bounds) - 1

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same microbatch on ``device``; ``active_rows`` and ``parents`` stay on the CPU."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("active_rows", "parents")}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def with_scores(
        self, *, old_log_probs: Tensor | None, token_weights: Tensor | None = None, ref_log_probs: Tensor | None = None
    ) -> MicroBatch:
        """The same microbatch after the scoring passes; ``old_log_probs`` None: the update's own are the old ones."""
        return replace(self, old_log_probs=old_log_probs, token_weights=token_weights, ref_log_probs=ref_log_probs)

    def with_credit(self, *, token_weights: Tensor | None, advantages: Tensor | None) -> MicroBatch:
        """The same microbatch with token weights (None: uniform); ``advantages`` None: the rollouts' own stay."""
        return replace(
            self, token_weights=token_weights, advantages=self.advantages if advantages is None else advantages
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """This data-parallel rank's microbatches of one optimiser step; every rank has the same number of them."""

    microbatches: tuple[MicroBatch, ...]
    totals: BatchTotals
    packing: PackingReport | None = None  # of all replicas together


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """Arguments of a policy loss over ``[T]`` label-aligned tokens of one microbatch.

    ``log_probs`` and ``entropy`` carry gradient; everything else is constant.  Positions with ``loss_mask`` False may
    hold anything, NaN included: they are selected away, never multiplied by zero.
    """

    log_probs: Tensor  # float32 [T], current policy
    advantages: Tensor  # float32 [T]
    loss_mask: Tensor  # bool [T]
    sequence_lengths: Tensor  # float32 [T], loss tokens of the whole sequence of t, whatever the split
    totals: BatchTotals | None = None  # None = not known yet: LossOutput.num_tokens is then the denominator to sum up
    old_log_probs: Tensor | None = None  # float32 [T], at the start of the step; None = log_probs: every ratio is 1
    entropy: Tensor | None = None  # float32 [T], nats
    token_weights: Tensor | None = None  # float32 [T]; None = uniform, plain GRPO
    rollout_log_probs: Tensor | None = None  # float32 [T], needed by importance-sampling correction only
    ref_log_probs: Tensor | None = None  # float32 [T], needed by the KL term only
    sequence_ids: Tensor | None = None  # int64 [T], needed by sequence-level ratios only


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """Megatron's loss contract: sums travel, one division happens at the end (by the global sum of ``num_tokens``)."""

    loss_sum: Tensor  # scalar float32 with gradient; loss = sum over everything / sum of num_tokens over everything
    num_tokens: Tensor  # scalar int, this microbatch's part of the denominator: its loss tokens
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> (sum, count), detached


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one step says to people and to ``metrics.jsonl``: plain numbers only."""

    step: int
    policy_version: int
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]  # wall time by phase
