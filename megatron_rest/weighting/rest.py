"""ResT's token weights: a raw weight per region, divided by its mean over the sequence's valid tokens.

    what_t = raw[region of t]        w_t = what_t / mean over the valid tokens of t's sequence (what)

The raw weights come from a source: the paper's constants under their curriculum, region entropies (Eq. 9), or Theorem 2
with measured score norms.  Because a region's weight is the same for all its tokens, a sequence's mean
needs only its token *counts* per region: they are integers, so the weights are bit-identical alone, batched and packed
in any order.

Trade taken: for entropies the scale is fixed by the think region (it keeps its configured gamma), so that clipping to
``[min_weight, max_weight]`` means the same in all sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_rest.config import WeightingConfig, WeightSource
from megatron_rest.credit_traits import traits_of
from megatron_rest.types import TokenRegion
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule
from megatron_rest.weighting.curriculum import NUM_REGIONS, check_progress, clip_positive, region_gammas
from megatron_rest.weighting.means import RegionMeans, region_sums
from megatron_rest.weighting.rules import entropy_weights

__all__ = ["RestWeighting"]

Array = TypeVar("Array", Tensor, np.ndarray)

_MIN_BETA = 1e-30  # a token whose distribution is a point mass has beta 0; the cap max_weight then decides


class RestWeighting(CreditRule):
    """Token weights of one sequence (call it), of packed sequences (:meth:`packed`) or of a step's rows.

    Torch in, torch out (same device); numpy in, numpy out; always float32, never with gradient.  ``CONTEXT`` and masked
    tokens get exactly 0 and do not count; the valid tokens of each sequence have mean 1 (with the source
    ``reference_code``: those of positive weight).
    """

    def __init__(self, config: WeightingConfig | None = None) -> None:
        self.config = _as_published(config) if config is not None else WeightingConfig()
        self.traits = traits_of(self.config.source)
        self._positive_only = self.config.source is WeightSource.REFERENCE_CODE
        self.means = RegionMeans(
            decay=self.config.entropy_decay,
            frozen_after_first=self.config.source is WeightSource.ENTROPY_OFFLINE,
        )

    @classmethod
    def from_config(cls, config: WeightingConfig) -> RestWeighting:
        """What a run's ``weighting`` section says."""
        return cls(config)

    @classmethod
    def uniform(cls) -> RestWeighting:
        """Weight 1 on every valid token: plain GRPO, bit for bit."""
        return cls(WeightingConfig(source=WeightSource.UNIFORM))

    @classmethod
    def paper(cls, *, alpha_format: float = 0.21, **overrides: Any) -> RestWeighting:
        """Region constants with the paper's curriculum: format decays, arguments and reasoning grow.

        The paper publishes no constants; these are the published code's, with ``alpha_format`` from the slope in its
        comment (0.002 a step over 105 steps).  ``overrides`` replaces any field of :class:`WeightingConfig`.
        """
        constants = WeightingConfig(source=WeightSource.CONSTANT, alpha_format=alpha_format)
        return cls(replace(constants, **overrides))

    @classmethod
    def reference_code(cls, *, total_steps: int = 105) -> RestWeighting:
        """The published code's weights on correct spans; use with ``dialect=TOOLRL_TAGS_ONLY`` and progress step/total.

        Glue and response text get 0, the mean is over positive tokens, gammas move by 0.002 a step.  Its off-by-one
        spans and lost calls are not reproduced here (benchmarks/reference_code.py does).
        """
        slope = 0.002 * total_steps
        return cls(WeightingConfig(source=WeightSource.REFERENCE_CODE, alpha_args=slope, alpha_think=slope))

    @property
    def statistic(self) -> str | None:
        """What :meth:`update` wants the region means of: ``"entropy"``, ``"beta"`` or None (nothing is measured)."""
        return self.traits.follows or None

    def credit(self, rows: CreditRows) -> Credit:
        """These weights as a rule of token credit: by the running means, whatever ``rows`` hold of statistics."""
        raw = torch.as_tensor(self.region_weights(rows.progress))
        rollouts = [slice(end - n, end) for end, n in zip(np.cumsum(rows.lengths), rows.lengths, strict=True)]
        counts = np.zeros((len(rollouts), NUM_REGIONS), np.int64)
        for i, mine in enumerate(rollouts):
            counts[i] = np.bincount(rows.regions[mine], minlength=NUM_REGIONS)
        counts[:, TokenRegion.CONTEXT] = 0
        total, counted = self._totals(torch.from_numpy(counts), raw)
        table = (raw * torch.where(total > 0, counted / total, 0.0)[:, None]).float().numpy()  # of rollout and region
        weights = np.empty(len(rows.regions), np.float32)
        for line, mine in zip(table, rollouts, strict=True):
            np.take(line, rows.regions[mine], out=weights[mine], mode="clip")
        return Credit(weights=weights)

    def update(self, sums: Tensor | Sequence[float], counts: Tensor | Sequence[float]) -> None:
        """Fold in this step's :func:`region_sums`, already added over all ranks and microbatches."""
        self.means.update(sums, counts)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to give the same weights, as plain numbers."""
        return self.means.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.means.load_state_dict(state)

    def region_weights(self, progress: float, *, means: np.ndarray | None = None) -> np.ndarray:
        """Raw weight of each region before normalisation: float64 ``[6]`` indexed by :class:`TokenRegion`.

        ``means`` replaces the running means of the measuring sources; before any measurement they use the constants.
        """
        if self.config.source is WeightSource.UNIFORM:
            check_progress(progress)
            return np.array([0.0] + [1.0] * (NUM_REGIONS - 1))
        constants = region_gammas(self.config, progress)
        if self.statistic is None:
            return constants
        measured = self.means.mean if means is None else means
        if np.isnan(measured).all():
            return constants
        return self._measured_weights(measured, constants, progress)

    def __call__(
        self,
        region_ids: Array,
        *,
        progress: float,
        entropy: Array | None = None,
        loss_mask: Array | None = None,
        beta: Array | None = None,
    ) -> Array:
        """Weights of one sequence.

        Args:
            region_ids: int ``[L]``, :class:`TokenRegion`.
            progress: 0 at the first step, 1 at the last.
            entropy: float ``[L]``, nats.  Entropy sources then use *this sequence's* region means instead of the
                running ones (for use without a trainer); other sources ignore it.
            loss_mask: bool ``[L]``; None = every token that is not CONTEXT.
            beta: float ``[L]`` score norms; ``variance_optimal`` then weights token by token instead of by region.

        Returns:
            float32 ``[L]``.  Raises ValueError on wrong shapes or progress.
        """
        ids = torch.as_tensor(region_ids)
        mask = None if loss_mask is None else torch.as_tensor(loss_mask)
        means = None
        if entropy is not None and self.statistic == "entropy":
            own = RegionMeans(decay=0.0)
            own.update(*region_sums(torch.as_tensor(entropy), ids, mask))
            means = own.mean
        table = self.region_weights(progress, means=means)
        weights = self._weigh(ids, torch.zeros_like(ids, dtype=torch.int64), table, mask, beta)
        return weights if isinstance(region_ids, Tensor) else weights.numpy()

    def packed(
        self,
        region_ids: Array,
        sequence_ids: Array,
        *,
        progress: float,
        loss_mask: Array | None = None,
        beta: Array | None = None,
    ) -> Array:
        """Weights of packed sequences, float32 ``[T]``; each sequence as if it were called alone.

        ``sequence_ids`` int ``[T]`` says which sequence a token belongs to (any ids, any order; negative = padding).
        Whole sequences only: a sequence cut over microbatches or context-parallel ranks must be weighted before the
        cut.
        """
        ids, sequences = torch.as_tensor(region_ids), torch.as_tensor(sequence_ids)
        if ids.shape != sequences.shape:
            raise ValueError(f"sequence_ids has shape {tuple(sequences.shape)}, expected {tuple(ids.shape)}")
        mask = sequences >= 0 if loss_mask is None else (sequences >= 0) & torch.as_tensor(loss_mask).bool()
        weights = self._weigh(ids, _dense(sequences), self.region_weights(progress), mask, beta)
        return weights if isinstance(region_ids, Tensor) else weights.numpy()

    def _measured_weights(self, measured: np.ndarray, constants: np.ndarray, progress: float) -> np.ndarray:
        """Inverse-variance weights where a region was measured, the constants elsewhere.

        ``c`` lets think (or, without one, the region that comes first) start at its configured gamma.
        """
        known = np.flatnonzero(~np.isnan(measured))
        reference = TokenRegion.THINK if TokenRegion.THINK in known else known[0]
        start = region_gammas(self.config, 0.0)
        raw = constants.copy()
        if self.statistic == "entropy":
            inverse = entropy_weights(measured[known], rule=self.config.entropy_rule, floor=self.config.entropy_floor)
            growth = self._curriculum_steps(progress)[known]
        else:  # Theorem 2 has no curriculum: weights that grow would no longer be its minimum
            inverse, growth = 1.0 / np.maximum(measured[known], _MIN_BETA), np.zeros(len(known))
        scale = start[reference] / inverse[list(known).index(reference)]
        base = np.clip(scale * inverse, self.config.min_weight, self.config.max_weight)
        raw[known] = np.maximum(base + growth, self.config.min_weight)
        return clip_positive(raw, self.config)

    def _curriculum_steps(self, progress: float) -> np.ndarray:
        """How far the curriculum has moved each region's weight from its start, ``[6]``."""
        steps = np.zeros(NUM_REGIONS)
        steps[TokenRegion.FORMAT] = -self.config.alpha_format * progress
        steps[TokenRegion.TOOL_ARGS] = self.config.alpha_args * progress
        steps[TokenRegion.THINK] = self.config.alpha_think * progress
        steps[TokenRegion.RESPONSE] = self.config.alpha_response * progress
        return steps

    def _weigh(
        self, region_ids: Tensor, sequence: Tensor, table: np.ndarray, loss_mask: Tensor | None, beta: Any
    ) -> Tensor:
        """float32 ``[T]``: raw weights over their mean in each sequence (``sequence`` int64 ``[T]``, 0..S-1)."""
        if region_ids.ndim != 1:
            raise ValueError(
                f"region_ids has shape {tuple(region_ids.shape)}, expected [L]: one sequence, or use packed()"
            )
        valid = region_ids != TokenRegion.CONTEXT
        if loss_mask is not None:
            if loss_mask.shape != region_ids.shape:
                raise ValueError(f"loss_mask has shape {tuple(loss_mask.shape)}, expected {tuple(region_ids.shape)}")
            valid = valid & loss_mask.bool()
        ids = region_ids.long()
        num_sequences = int(sequence.max()) + 1 if len(sequence) else 0
        if beta is not None and self.config.source is WeightSource.VARIANCE_OPTIMAL:
            raw = self._per_token(torch.as_tensor(beta), sequence, valid, num_sequences)
            total = raw.new_zeros(num_sequences).index_add_(0, sequence, raw)
            counted = torch.bincount(sequence[valid], minlength=num_sequences)
        else:
            by_region = torch.as_tensor(table, device=ids.device)
            raw = torch.where(valid, by_region[ids], 0.0)
            counts = torch.bincount((sequence * NUM_REGIONS + ids)[valid], minlength=num_sequences * NUM_REGIONS)
            total, counted = self._totals(counts.view(num_sequences, NUM_REGIONS), by_region)
        scale = torch.where(total > 0, counted / total, 0.0)
        return (raw * scale[sequence]).float()

    def _totals(self, counts: Tensor, by_region: Tensor) -> tuple[Tensor, Tensor]:
        """float64 ``[S]`` sum of raw weights, and of how many tokens, from the valid tokens by region ``[S, 6]``."""
        total = (counts * by_region).sum(dim=1)
        return total, (counts[:, by_region > 0] if self._positive_only else counts).sum(dim=1)

    def _per_token(self, beta: Tensor, sequence: Tensor, valid: Tensor, num_sequences: int) -> Tensor:
        """Theorem 2 token by token: a token of its sequence's mean score norm gets gamma_think, clipped like all."""
        if beta.shape != valid.shape:
            raise ValueError(f"beta has shape {tuple(beta.shape)}, expected {tuple(valid.shape)}")
        known = torch.where(valid, beta.detach().double(), 0.0)
        count = torch.bincount(sequence[valid], minlength=num_sequences).clamp_min(1)
        mean = known.new_zeros(num_sequences).index_add_(0, sequence, known) / count
        raw = self.config.gamma_think * mean[sequence] / known.clamp_min(_MIN_BETA)
        return torch.where(valid, raw.clamp(self.config.min_weight, self.config.max_weight), 0.0)


def _as_published(config: WeightingConfig) -> WeightingConfig:
    """With the published code as source, the response has no weight and nothing decays, whatever is configured."""
    if config.source is not WeightSource.REFERENCE_CODE:
        return config
    return replace(config, gamma_response=0.0, alpha_response=0.0, alpha_format=0.0)


def _dense(sequences: Tensor) -> Tensor:
    """Sequence ids as small non-negative integers.  Sorting them is needed only where they are sparse."""
    if len(sequences) == 0:
        return sequences.long()
    low, high = sequences.aminmax()
    if int(high - low) <= len(sequences):
        return (sequences - low).long()
    return torch.unique(sequences, return_inverse=True)[1]
