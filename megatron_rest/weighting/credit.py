"""The interface of token credit: the rows of a step in, token weights or token advantages out.

    rows = CreditRows.of_samples(samples, rewards=rewards, progress=0.5, scores={"entropy": entropy})
    credit = find_credit(config.weighting).credit(rows)          # weights [N] and/or advantages [N], float64

A *row* is a loss token.  The rows of a rollout lie together and in order, rollouts in the order of the step, whatever
microbatch, context-parallel rank or replica holds them: a rule cannot see how the work is split, so its credit cannot
depend on it.  What a rule may look at beside them, and what its weights add up to, it declares
(:class:`~megatron_rest.credit_traits.CreditTraits`); the denominators of the loss are not its affair.

A rule of one's own is a class with ``traits`` and ``credit``, named in the configuration:

    @dataclass(frozen=True)
    class LateTokens(CreditRule):                                # weighting.source=mine.late:LateTokens
        slope: float = 1.0                                       # weighting.options.slope=2.0
        traits = CreditTraits(normalisation=Normalisation.ROLLOUT)

        def credit(self, rows: CreditRows) -> Credit:
            return Credit(weights=rows.mean_one(1.0 + self.slope * rows.index / rows.each(rows.lengths)))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_rest.credit_traits import STATISTICS, CreditTraits, Normalisation
from megatron_rest.types import TrainSample

__all__ = ["Credit", "CreditRows", "CreditRule", "runs", "standardised"]

_MOST_SLICES = 16  # of a rollout
_ROUNDING = 1e-12  # of a reward's parts against the whole
_MEAN_TOLERANCE = 1e-5  # of weights that say they have mean 1; float32 ones of thousands of tokens miss by 1e-7


@dataclass(frozen=True, kw_only=True)
class CreditRows:
    """N loss tokens of S rollouts, numpy.  Per-token arrays speak of the token itself (not of the one before it)."""

    sequence: np.ndarray  # int64 [N], the rollout, 0..S-1, never falling
    token: np.ndarray  # int64 [N], place in prompt and response of the rollout, rising within it
    regions: np.ndarray  # int8 [N], TokenRegion
    groups: np.ndarray  # int64 [S], siblings share one; -1: of none
    advantages: np.ndarray  # float64 [S], of the rollout
    rewards: np.ndarray  # float64 [S], what the advantages come from
    progress: float  # of the run, in [0, 1]
    log_probs: np.ndarray | None = None  # float [N], nats; of the policy as the step begins
    entropy: np.ndarray | None = None  # float [N], nats
    sum_p2: np.ndarray | None = None  # float [N], sum of the squared probabilities
    beta: np.ndarray | None = None  # float [N], squared score norm of the output layer
    ref_log_probs: np.ndarray | None = None  # float [N], nats; of the reference policy
    marks: np.ndarray | None = None  # uint8 [N], TurnMark of the row's turn
    token_rewards: np.ndarray | None = None  # float64 [N], a part of ``rewards``; NaN: nothing was said of the token

    def __post_init__(self) -> None:
        size, count = len(self.sequence), len(self.groups)
        for name in ("token", "regions", *STATISTICS):
            value = getattr(self, name)
            if value is not None and value.shape != (size,):
                raise ValueError(f"{name} has shape {value.shape}, expected ({size},) like sequence")
        for name in ("advantages", "rewards"):
            if getattr(self, name).shape != (count,):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected ({count},) like groups")

    @classmethod
    def of_samples(
        cls,
        samples: Sequence[TrainSample],
        *,
        rewards: Sequence[float] | np.ndarray,
        progress: float,
        scores: Mapping[str, np.ndarray] | None = None,
    ) -> CreditRows:
        """Rows of whole rollouts.

        Args:
            samples: in the order of the step, or those of a microbatch; a rule gets what its scope asks for.
            rewards: one a sample.
            progress: curriculum progress.
            scores: statistics of :data:`STATISTICS`, ``[N]`` each, in the order of the rows; float32 becomes float64.
        """
        tokens = [np.flatnonzero(s.loss_mask) for s in samples]
        counts = [len(t) for t in tokens]
        regions = [s.region_ids[t] for s, t in zip(samples, tokens, strict=True)]
        marks = [s.marks[t] for s, t in zip(samples, tokens, strict=True) if s.marks is not None]
        earned: np.ndarray | None = None
        if any(s.token_rewards is not None for s in samples):
            none = np.array([np.nan])
            earned = np.concatenate(
                [
                    np.broadcast_to(none, len(t)) if s.token_rewards is None else s.token_rewards[t]
                    for s, t in zip(samples, tokens, strict=True)
                ]
            )
        return cls(
            sequence=np.repeat(np.arange(len(samples)), counts),
            token=np.concatenate([np.zeros(0, np.int64), *tokens]),
            regions=np.concatenate([np.zeros(0, np.int8), *regions]),
            groups=np.array([s.group_id for s in samples], np.int64),
            advantages=np.array([s.advantage for s in samples], np.float64),
            rewards=np.asarray(rewards, np.float64),
            progress=progress,
            marks=np.concatenate([np.zeros(0, np.uint8), *marks]) if len(marks) == len(samples) else None,
            token_rewards=earned,
            **{name: np.asarray(value, np.float64) for name, value in (scores or {}).items()},
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 ``[S]``: loss tokens of each rollout."""
        return np.bincount(self.sequence, minlength=len(self.groups))

    @cached_property
    def index(self) -> np.ndarray:
        """int64 ``[N]``: place among the rollout's loss tokens, from 0."""
        return np.arange(len(self.sequence)) - np.repeat(self._starts, self.lengths)

    @cached_property
    def place(self) -> np.ndarray:
        """int64 ``[N]``: tokens between the rollout's first loss token and this one; tool outputs count."""
        has_rows = self.lengths > 0
        return self.token - np.repeat(self.token[self._starts[has_rows]], self.lengths[has_rows])

    @cached_property
    def turn(self) -> np.ndarray:
        """int64 ``[N]``: the answer within its rollout, from 0: a run of loss tokens."""
        turns, _ = self.turns
        has_rows = self.lengths > 0
        return turns - np.repeat(turns[self._starts[has_rows]], self.lengths[has_rows])

    @cached_property
    def turns(self) -> tuple[np.ndarray, np.ndarray]:
        """All turns of all rollouts numbered from 0, int64 ``[N]``, and the rollout of each, int64 ``[turns]``."""
        starts = self.turn_starts
        return np.repeat(np.arange(len(starts)), np.diff(starts, append=len(self.token))), self.sequence[starts]

    @cached_property
    def turn_starts(self) -> np.ndarray:
        """int64 ``[turns]``: first row of each turn of each rollout."""
        opens = np.ones(len(self.token), bool)
        np.not_equal(np.diff(self.token), 1, out=opens[1:])
        opens[self._starts[self.lengths > 0]] = True
        return np.flatnonzero(opens)

    @cached_property
    def siblings(self) -> np.ndarray:
        """int64 ``[S]``: number of each rollout's group; one that is of none is a group of its own."""
        numbers = np.unique(self.groups, return_inverse=True)[1]
        return np.where(self.groups < 0, len(self.groups) + np.arange(len(self.groups)), numbers)

    @property
    def earned(self) -> np.ndarray:
        """float64 ``[N]``: rewards by token, which add up to the rollout's; :attr:`unsaid` lies on its last one."""
        return self._earned[0]

    @property
    def unsaid(self) -> np.ndarray:
        """float64 ``[S]``: what the rollout earned beside what was said of its tokens; exactly 0 for rounding."""
        return self._earned[1]

    @cached_property
    def _earned(self) -> tuple[np.ndarray, np.ndarray]:
        earned, rest = np.zeros(len(self.sequence)), self.rewards.astype(np.float64)
        if self.token_rewards is not None:
            np.copyto(earned, self.token_rewards, where=~np.isnan(self.token_rewards))
            said, size = self.sums(earned), np.maximum(1.0, self.sums(np.abs(earned)))
            rest = np.where(np.abs(self.rewards - said) > _ROUNDING * size, self.rewards - said, 0.0)
        earned[self.ends] += rest[self.lengths > 0]
        return earned, rest

    @cached_property
    def returns(self) -> np.ndarray:
        """float64 ``[N]``: what is earned from this token on; the rollout's reward where nothing was said of tokens."""
        return self.each(self.rewards) if self.token_rewards is None else self.from_here(self.earned)

    @cached_property
    def ends(self) -> np.ndarray:
        """int64: the last row of each rollout that has any."""
        return (self._starts + self.lengths)[self.lengths > 0] - 1

    @cached_property
    def is_left_alone(self) -> np.ndarray:
        """bool ``[S]``: of its siblings no other has a row, though it has some: nobody to be compared with."""
        members = np.bincount(self.siblings)[self.siblings]
        return (members > 1) & (np.bincount(self.siblings, self.lengths > 0)[self.siblings] <= 1)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def each(self, values: np.ndarray) -> np.ndarray:
        """``[S]`` -> ``[N]``: the number of its rollout for every row."""
        return np.repeat(values, self.lengths)

    def require(self, needs: frozenset[str]) -> None:
        """ValueError if a statistic is not there.  Of ``token_rewards`` None says something: that nothing was said."""
        missing = sorted(name for name in needs - {"token_rewards"} if getattr(self, name) is None)
        if missing:
            raise ValueError(f"token credit needs {', '.join(missing)} of every token, and there is none")

    def sums(self, values: np.ndarray) -> np.ndarray:
        """float64 ``[S]``: added over the rows of each rollout; the same whatever rollouts stand beside it."""
        has_rows, sums = self.lengths > 0, np.zeros(len(self.groups))
        if has_rows.any():
            sums[has_rows] = np.add.reduceat(values.astype(np.float64, copy=False), self._starts[has_rows])
        return sums

    def from_here(self, values: np.ndarray) -> np.ndarray:
        """float64 ``[N]``: added from each row to the last one of its rollout."""
        added = np.empty(len(values))
        for start, length in zip(self._starts.tolist(), self.lengths.tolist(), strict=True):
            mine = slice(start, start + length)  # no sum crosses rollouts
            np.cumsum(values[mine][::-1], out=added[mine][::-1])
        return added

    def means(self, values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """float64 ``[S]``: mean over the rows of each rollout (those of ``where``); 0 where there is none."""
        if where is None:
            return self.sums(values) / np.maximum(self.lengths, 1)
        count = self.sums(where.astype(np.float64))
        return self.sums(np.where(where, values, 0.0)) / np.maximum(count, 1.0)

    def mean_one(self, weights: np.ndarray) -> np.ndarray:
        """Weights over their mean in each rollout (0 where it has none)."""
        mean = self.means(weights)
        return weights * self.each(np.divide(1.0, mean, out=np.zeros_like(mean), where=mean > 0))

    def across(
        self, position: np.ndarray, *values: np.ndarray | float, kind: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """float64 ``[N]`` each: ``values`` added over siblings' rows of the same ``position``, rollout after rollout.

        Args:
            position: int64 ``[N]``, >= 0 and rising within each rollout.
            values: ``[N]``, or one number that all rows have.
            kind: 0 or 1 a rollout, ``[S]``: siblings of the same kind only.
        """
        added = [np.empty(len(position)) for _ in values]
        table = np.zeros((len(values), int(position.max(initial=0)) + 1))
        for members in self.families(kind):
            table[:] = 0.0
            mine = [self.rows_of(i) for i in members]
            pieces = [piece for rows in mine for piece in runs(position[rows], rows.start)]
            for cells, total in zip(table, values, strict=True):
                for rows, places in pieces:
                    cells[places] += total if isinstance(total, float) else total[rows]
            for cells, out in zip(table, added, strict=True):
                for rows, places in pieces:
                    out[rows] = cells[places]
        return added

    def families(self, kind: np.ndarray | None = None) -> list[np.ndarray]:
        """Rollouts that have rows, siblings together (those of the same ``kind``, 0 or 1 a rollout), in their order."""
        side = self.siblings if kind is None else self.siblings * 2 + kind
        order = np.argsort(side, kind="stable")
        order = order[self.lengths[order] > 0]
        if not len(order):
            return []
        return np.split(order, np.flatnonzero(np.diff(side[order])) + 1)

    def rows_of(self, i: int) -> slice:
        """Of rollout ``i``."""
        return slice(int(self._starts[i]), int(self._starts[i] + self.lengths[i]))


def runs(places: np.ndarray, first: int) -> list[tuple[slice, slice | np.ndarray]]:
    """Rows ``first``, ``first + 1``, ... and their ``places``, which rise: as slices (a tenth of the cost) where there
    are few gaps."""
    size = len(places)
    gaps: list[int] = []
    if places[-1] - places[0] >= size:
        gaps = (np.flatnonzero(np.diff(places) != 1) + 1).tolist()
    if len(gaps) > _MOST_SLICES:
        return [(slice(first, first + size), places)]
    bounds = [0, *gaps, size]
    return [(slice(first + a, first + b), slice(int(places[a]), int(places[a]) + b - a)) for a, b in pairwise(bounds)]


def standardised(values: np.ndarray, epsilon: float) -> np.ndarray:
    """``(value - mean) / (std + epsilon)`` of float64 ``[n]``, with the unbiased standard deviation.

    As in GRPO: equal values give exactly 0; one alone has mean 0 and std 1.
    """
    if len(values) == 1:
        return values / (1.0 + epsilon)
    if not len(values) or values.min() == values.max():
        return np.zeros(len(values))
    return (values - values.mean()) / (values.std(ddof=1) + epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    """What a rule gives to each row; None = as it was: weight 1, the rollout's advantage."""

    weights: np.ndarray | None = None  # [N], >= 0
    advantages: np.ndarray | None = None  # [N]

    def check(self, rows: CreditRows, traits: CreditTraits, name: str) -> Credit:
        """This credit, if it is one.  Raises ValueError naming the rule: shape, NaN, negative or unnormalised."""
        for kind in ("weights", "advantages"):
            value = getattr(self, kind)
            if value is None:
                continue
            if not isinstance(value, np.ndarray) or value.shape != rows.sequence.shape:
                what = f"shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
                raise ValueError(f"{name} gave {kind} of {what}, expected numpy {rows.sequence.shape}: one a row")
            if not np.isfinite(value).all():
                at = int(np.flatnonzero(~np.isfinite(value))[0])
                raise ValueError(f"{name} gave {kind} that are not finite: {value[at]} at row {at}")
        if self.weights is None:
            return self
        if self.weights.min(initial=0.0) < 0:
            raise ValueError(f"{name} gave a negative weight, {float(self.weights.min())}: turn the advantage instead")
        if traits.normalisation is Normalisation.ROLLOUT:
            means = rows.means(self.weights)
            wrong = (np.abs(means - 1.0) > _MEAN_TOLERANCE) & (means != 0)
            if wrong.any():
                raise ValueError(
                    f"{name} declares weights of mean 1 in each rollout, and one has {means[wrong][0]:.6g}: use "
                    "rows.mean_one, or declare Normalisation.NONE"
                )
        return self


class CreditRule:
    """Base of rules without state.  What a resumed run must know goes into ``state_dict``: numbers, lists, strings."""

    traits: CreditTraits = CreditTraits()

    def credit(self, rows: CreditRows) -> Credit:
        """Weights and/or advantages of ``rows``: all rows of the step, or of some rollouts (``traits.scope``).

        Called once a step; where the scope is the group or the step, with the same rows on every rank, so a state that
        moves here is the same everywhere.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state
