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

__all__ = ["rollout_correction"]


def rollout_correction(inputs: LossInputs, old_log_probs: Tensor, config: LossConfig) -> Tensor:
    """Truncated ratios ``[T]``, detached, 1 at masked positions.

    Raises:
        ValueError: sequence level with a sequence that is not whole in this microbatch (context parallelism, say): its
            product over tokens cannot be formed here.
    """
    assert inputs.rollout_log_probs is not None and config.tis_cap is not None  # checked by the loss
    mask = inputs.loss_mask
    log_ratio = torch.where(mask, old_log_probs - inputs.rollout_log_probs.detach(), 0.0)
    if config.tis_level == "sequence":
        log_ratio = torch.where(mask, _sum_over_sequence(log_ratio, inputs), 0.0)
    limit = config.max_log_ratio
    return log_ratio.clamp(-limit, limit).exp().clamp(max=config.tis_cap)


def _sum_over_sequence(values: Tensor, inputs: LossInputs) -> Tensor:
    """Sum of ``values`` over the valid tokens of each token's sequence, ``[T]``."""
    assert inputs.sequence_ids is not None  # checked by the loss
    mask = inputs.loss_mask
    _, index = torch.unique(inputs.sequence_ids, return_inverse=True)
    zeros = values.new_zeros(len(values))
    counts = zeros.index_add(0, index, mask.to(values.dtype))[index]
    if (mask & (counts != inputs.sequence_lengths)).any():
        raise ValueError(
            "a sequence is cut: sequence-level importance sampling needs all its tokens in one microbatch on one "
            "context-parallel rank; use tis_level=token"
        )
    return zeros.index_add(0, index, values)[index]
