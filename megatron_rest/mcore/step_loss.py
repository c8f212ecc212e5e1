"""A policy loss as Megatron's pipeline schedule wants it, for one microbatch of whatever shape.

    step = StepLoss(loss, LossTokens.of_batch(batch))            # batch: the host's dict of [b, s] tensors
    output = model(tokens, position_ids, mask, labels=labels, output_processor_context=step.context)
    return output, step                                          # what a forward_step returns

``step(output)`` is Megatron's ``loss_func``: ``(loss_sum, num_tokens, {name: [sum, count]})``.  The model's config must
have ``calculate_per_token_loss=True``: Megatron then divides by the sum of ``num_tokens`` over microbatches, data- and
context-parallel ranks, and no split of the work changes the gradient.

``step.context`` tells the head which rows carry loss and, where the loss allows it, how to differentiate them while the
logits are at hand.  The log-probs and the entropy beside such a loss are constants: a term of your own on them belongs
into the loss (``token_losses``), or leave the context out, which changes the cost and gives them their gradient back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_rest.mcore.head import HeadContext, PolicyOutput
from megatron_rest.types import BatchTotals, LossInputs, LossOutput, MicroBatch

__all__ = ["LossTokens", "PolicyLoss", "SeparableLoss", "StepLoss"]

PolicyLoss = Callable[[LossInputs], LossOutput]

_NO_COLUMNS = ("totals", "active_rows", "left_out_tokens")


@runtime_checkable
class SeparableLoss(Protocol):
    """A policy loss that can say the loss of each token (``algorithms.RestPolicyLoss``)."""

    @property
    def is_token_separable(self) -> bool: ...

    def __call__(self, inputs: LossInputs) -> LossOutput: ...

    def token_losses(self, inputs: LossInputs) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTokens:
    """What a loss knows of its tokens before the forward pass: ``LossInputs`` without log_probs and entropy.

    ``[T]`` in the head's row order: the packed tokens, or a padded ``[b, s]`` batch read as ``[s, b]``.
    """

    advantages: Tensor  # float32 [T]
    loss_mask: Tensor  # bool [T]
    sequence_lengths: Tensor  # float32 [T]
    old_log_probs: Tensor | None = None  # float32 [T]
    token_weights: Tensor | None = None  # float32 [T]
    rollout_log_probs: Tensor | None = None  # float32 [T]
    ref_log_probs: Tensor | None = None  # float32 [T]
    sequence_ids: Tensor | None = None  # int64 [T]
    totals: BatchTotals | None = None
    active_rows: Tensor | None = None  # int64 on the CPU: rows with loss; None = not known there, all are projected
    left_out_tokens: int = 0  # that count in the denominator, but need not be computed: they have no gradient

    @classmethod
    def of_microbatch(cls, microbatch: MicroBatch, totals: BatchTotals | None) -> LossTokens:
        return cls(
            advantages=microbatch.advantages,
            loss_mask=microbatch.loss_mask,
            sequence_lengths=microbatch.sequence_lengths,
            old_log_probs=microbatch.old_log_probs,
            token_weights=microbatch.token_weights,
            rollout_log_probs=microbatch.rollout_log_probs,
            ref_log_probs=microbatch.ref_log_probs,
            sequence_ids=microbatch.sequence_ids,
            totals=totals,
            active_rows=microbatch.active_rows,
            left_out_tokens=microbatch.left_out_tokens,
        )

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor], *, totals: BatchTotals | None = None) -> LossTokens:
        """Read a Megatron-LM style batch: tensors ``[b, s]``, index t of each speaks of ``labels[:, t]``.

        Args:
            batch: ``loss_mask`` (bool, or numbers that are 0 or 1) and ``advantages`` (``[b, s]`` or one a sequence:
                ``[b]``, ``[b, 1]``, or ``[n]`` beside ``cu_seqlens``); optional ``old_log_probs``,
                ``token_weights``, ``rollout_log_probs``, ``ref_log_probs`` (``[b, s]``), ``cu_seqlens`` (``[n + 1]``,
                packed sequences of a batch of 1; otherwise every row is a sequence) and ``active_rows``.  Other keys
                are the host's and are not looked at.
            totals: of the whole optimiser step, where the data pipeline knows them; not needed otherwise.

        ``active_rows`` are computed here if ``loss_mask`` is on the CPU.  A mask on a device is not read back: put
        ``(loss_mask.T.reshape(-1) != 0).nonzero()[:, 0]`` of the CPU tensor into the batch where it is collated.
        """
        missing = [name for name in ("loss_mask", "advantages") if name not in batch]
        if missing:
            raise ValueError(f"the batch has no {' and no '.join(missing)}, only {', '.join(sorted(batch))}")
        mask = _binary(batch["loss_mask"])
        sequence_ids = _sequence_ids(mask, batch.get("cu_seqlens"))
        columns: dict[str, Tensor | None] = {}
        for name in ("advantages", "old_log_probs", "token_weights", "rollout_log_probs", "ref_log_probs"):
            value = batch.get(name)
            if value is not None and name == "advantages":
                value = _by_token(value, sequence_ids, batch.get("cu_seqlens"))
            if value is not None and value.shape != mask.shape:
                raise ValueError(f"{name} is {list(value.shape)}, expected {list(mask.shape)} like loss_mask")
            columns[name] = None if value is None else _rows(value).float()
        counts = mask.new_zeros(int(mask.numel()) + 1, dtype=torch.float32)  # as many sequences there can be
        counts = counts.index_add(0, sequence_ids.reshape(-1), mask.reshape(-1).float())
        rows = batch.get("active_rows")
        if rows is None and mask.device.type == "cpu":
            rows = _rows(mask).nonzero()[:, 0]
        return cls(
            loss_mask=_rows(mask),
            sequence_lengths=_rows(counts[sequence_ids].clamp_min(1.0)),
            sequence_ids=_rows(sequence_ids),
            totals=totals,
            active_rows=rows,
            **columns,  # type: ignore[arg-type]
        )

    def inputs(self, log_probs: Tensor, entropy: Tensor, rows: Tensor | slice | None = None) -> LossInputs:
        """Arguments of the loss; with ``rows`` of these alone, for which ``log_probs`` and ``entropy`` are."""
        columns = {name: value if rows is None or value is None else value[rows] for name, value in self._columns()}
        return LossInputs(log_probs=log_probs, entropy=entropy, totals=self.totals, **columns)  # type: ignore[arg-type]

    def _columns(self) -> list[tuple[str, Tensor | None]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.name not in _NO_COLUMNS]


class StepLoss:
    """``loss`` bound to the tokens of one microbatch: the head's context, and Megatron's ``loss_func``."""

    def __init__(self, loss: PolicyLoss, tokens: LossTokens) -> None:
        self.loss = loss
        self.tokens = tokens

    @property
    def context(self) -> HeadContext:
        """For ``model(..., output_processor_context=...)``."""
        loss = self.loss
        is_separable = isinstance(loss, SeparableLoss) and loss.is_token_separable
        return HeadContext(
            active_rows=self.tokens.active_rows,
            loss_mask=self.tokens.loss_mask,
            token_loss=self._token_losses if is_separable else None,
        )

    def _token_losses(self, log_probs: Tensor, entropy: Tensor, rows: Tensor | slice) -> Tensor:
        assert isinstance(self.loss, SeparableLoss)
        return self.loss.token_losses(self.tokens.inputs(log_probs, entropy, rows))

    def __call__(self, output: PolicyOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """``(loss_sum, num_tokens, {name: float32 [sum, count]})``; metric "loss" is the loss itself."""
        if isinstance(output, Tensor):
            raise TypeError(
                f"the model returned a tensor {list(output.shape)} (its own cross-entropy, or logits) and no "
                "log-probs: call attach(model, vocab_size=...) on every chunk before it is wrapped, and pass labels"
            )
        output = PolicyOutput(*output)
        out = self.loss(self.tokens.inputs(_rows(output.log_probs), _rows(output.entropy)))
        loss_sum = out.loss_sum if output.loss_sum is None else output.loss_sum
        num_tokens = out.num_tokens + self.tokens.left_out_tokens
        metrics = {**out.metrics, "loss": (loss_sum, num_tokens)}
        pairs = {name: torch.stack([p.detach().float() for p in pair]) for name, pair in metrics.items()}
        return loss_sum, num_tokens.to(torch.int), pairs


def _rows(values: Tensor) -> Tensor:
    """``[b, s] -> [s * b]``, the order in which Megatron's hidden states ``[s, b, H]`` are flattened."""
    return values.transpose(0, 1).reshape(-1)


def _binary(mask: Tensor) -> Tensor:
    if mask.dim() != 2:
        raise ValueError(f"loss_mask is {list(mask.shape)}, expected [b, s] (a packed batch has b = 1)")
    is_on = mask != 0
    if mask.device.type == "cpu" and mask.is_floating_point() and not torch.equal(is_on.to(mask.dtype), mask):
        raise ValueError("loss_mask holds numbers besides 0 and 1: it selects; put factors into token_weights")
    return is_on


def _by_token(advantages: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[b, s]`` of advantages that are one a sequence; others as they came."""
    sequences = len(sequence_ids) if cu_seqlens is None else cu_seqlens.numel() - 1
    if advantages.shape == sequence_ids.shape or advantages.shape not in ((sequences,), (sequences, 1)):
        return advantages
    # what lies behind the last sequence is padding, and belongs to none
    return advantages.reshape(-1)[sequence_ids.clamp(max=sequences - 1)]


def _sequence_ids(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[b, s]``: number of the sequence of each token."""
    batch, length = mask.shape
    if cu_seqlens is None:
        return torch.arange(batch, device=mask.device)[:, None].expand(mask.shape)
    if batch != 1:
        raise ValueError(f"cu_seqlens describe a packed batch of 1, but the batch is {batch}: leave them out")
    bounds = cu_seqlens.reshape(-1)[1:].to(mask.device, torch.int64)
    return torch.searchsorted(bounds, torch.arange(length, device=mask.device), right=True)[None]
