"""Truncated importance sampling between the engine that sampled and the engine that trains.

The rollout engine's log-probs differ from the trainer's by kernels and precision, so the data is slightly off-policy.
Each token loss is multiplied by ``min(pi_train_old / pi_rollout, cap)``, a constant: per token, or per sequence as the
product over its tokens (unbiased up to the cap, but its variance grows with the length).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rest.config import LossConfig
from megatron_rest.types import LossInputs

__all__ = ["rollout_correction", "sum_over_sequence", "truncated_ratios"]


def rollout_correction(inputs: LossInputs, old_log_probs: Tensor, config: LossConfig) -> Tensor:
    """Truncated ratios ``[T]``, detached, 1 at masked positions.

    Raises:
        ValueError: sequence level with a sequence that is not whole in this microbatch (context parallelism, say): its
            product over tokens cannot be formed here.
    """
    assert inputs.rollout_log_probs is not None and config.tis_cap is not None  # checked by the loss
    return truncated_ratios(
        old_log_probs - inputs.rollout_log_probs.detach(),
        inputs.loss_mask,
        config,
        sequence_ids=inputs.sequence_ids,
        sequence_lengths=inputs.sequence_lengths,
    )


def truncated_ratios(
    log_ratio: Tensor, mask: Tensor, config: LossConfig, *, sequence_ids: Tensor | None, sequence_lengths: Tensor
) -> Tensor:
    """``min(exp(log_ratio), tis_cap)`` ``[T]`` per token or per sequence, 1 at masked positions.

    Args:
        log_ratio: float ``[T]``, training minus rollout log-prob; anything where masked.
        mask: bool ``[T]``.
        config: ``tis_cap`` is set.
        sequence_ids: int ``[T]``; needed by the sequence level only.
        sequence_lengths: loss tokens of each token's sequence.
    """
    assert config.tis_cap is not None
    log_ratio = torch.where(mask, log_ratio, 0.0)
    if config.tis_level == "sequence":
        assert sequence_ids is not None
        whole = sum_over_sequence(log_ratio, mask, sequence_ids, sequence_lengths)
        log_ratio = torch.where(mask, whole, 0.0)
    limit = config.max_log_ratio
    return log_ratio.clamp(-limit, limit).exp().clamp(max=config.tis_cap)


def sum_over_sequence(values: Tensor, mask: Tensor, sequence_ids: Tensor, sequence_lengths: Tensor) -> Tensor:
    """Sum of ``values`` over the valid tokens of each token's sequence, ``[T]``."""
    index = _numbered(sequence_ids)
    zeros = values.new_zeros(len(values))
    counts = zeros.index_add(0, index, mask.to(values.dtype))[index]
    message = (
        "a sequence is cut: a ratio over a whole sequence needs all its tokens in one microbatch on one "
        "context-parallel rank; use tis_level=token, and not loss.function=gspo"
    )
    is_whole = ~(mask & (counts != sequence_lengths)).any()
    if is_whole.device.type != "cpu":
        torch._assert_async(is_whole, message)
    elif not bool(is_whole):
        raise ValueError(message)
    return zeros.index_add(0, index, values)[index]


def _numbered(ids: Tensor) -> Tensor:
    """int64 ``[T]``: the same number, below T, for the same id.  ``torch.unique`` would ask the device how many."""
    ordered, order = ids.sort()
    number = torch.cat([ordered.new_zeros(min(len(ids), 1)), (ordered.diff() != 0).to(ordered.dtype)]).cumsum(0)
    return torch.empty_like(order).scatter_(0, order, number.to(order.dtype))
