"""Which samples go into which microbatch: even work, nothing left out.  Integers and floats only: no torch.

The *row* is the unit: one position that goes through the layers.  A bin is a microbatch.  Bins are filled longest
first, each item into the bin with the least work that has room, and then the fullest ones exchange items with others:
replicas end together, and a pipeline, all of whose microbatches have the length of the longest, is not paced by one; no
bin is empty while there are samples enough.  That length is rounded up (FP8's blocks times TP can be 1,024 rows), so a
pipeline takes as many bins as make their number times the length least.

Samples of a group begin with the same prompt.  Where prompts are shared, a *part* of a group (all of it, if it fits)
lies in one bin and its common rows are there once; a group is cut into several parts, each with a copy of those rows,
only where that lets the slowest replica end earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from megatron_rest.data.alignment import round_up
from megatron_rest.model_map import ModelShape
from megatron_rest.packing_report import PackingReport

__all__ = ["ROWS_ONLY", "Packable", "Part", "RowCost", "deal", "even_bins", "shared_rows"]

_CUTS = (float("inf"), 2.0, 1.0, 0.75, 0.5, 0.35, 0.25)  # largest part, in mean bins
_WORTH_CUTTING = 0.98  # a cut computes rows again: it must win at least this
_EXCHANGES, _EXCHANGES_WORK = 8, 8_000_000  # most of them a bin; and pairs of choices that are looked at
_MORE_BINS = 3  # multiples beyond the fewest that a pipeline tries
_FEW_ITEMS = 5  # of a bin that are exchanged in every way
_SMALLEST_GAIN = 1e-4


class Packable(Protocol):
    """What is looked at of a ``TrainSample``; the planner has lengths alone, and packs those."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_loss_tokens(self) -> int: ...

    @property
    def first_loss(self) -> int: ...

    def head(self, count: int) -> np.ndarray: ...

    @property
    def group_id(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCost:
    """Work in units of one row through the matrices of all layers."""

    pair: float = 0.0  # one query with one key
    loss_row: float = 0.0  # one row through the output layer

    @classmethod
    def of_shape(cls, shape: ModelShape) -> RowCost:
        """Floating-point operations, by the weights a row meets and the pairs it attends to."""
        queries = shape.num_attention_heads * shape.head_dim
        attention = 2 * shape.hidden_size * (queries + shape.num_query_groups * shape.head_dim)
        dense = 3 * shape.hidden_size * shape.ffn_hidden_size
        experts = 3 * shape.hidden_size * shape.moe_ffn_hidden_size * shape.num_experts_per_token
        num_dense = len(shape.dense_layers) if shape.num_experts else shape.num_layers
        weights = shape.num_layers * attention + num_dense * dense + (shape.num_layers - num_dense) * experts
        return cls(
            pair=2 * shape.num_layers * queries / weights, loss_row=shape.vocab_size * shape.hidden_size / weights
        )

    def __call__(self, rows: int, *, above: int = 0, loss_rows: int = 0) -> float:
        """Of ``rows`` consecutive rows that also attend to ``above`` earlier ones."""
        return rows + self.pair * (rows * above + rows * (rows + 1) / 2) + self.loss_row * loss_rows


ROWS_ONLY = RowCost()


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Samples that lie in one microbatch together."""

    members: tuple[int, ...]  # indices of samples
    shared: int  # first rows, the same in all members and there once
    rows: int
    cost: float


def shared_rows(samples: Sequence[Packable], *, multiple: int = 1) -> int:
    """Rows that all ``samples`` begin with and that carry no loss in any of them; 0 for one sample alone.

    The row of the last prompt token predicts the first token of the answer, so it is never among them: every row has
    one label and one owner.  Rounded down to ``multiple``: padding inside a prompt would be seen by its answers.
    """
    if len(samples) < 2:
        return 0
    rows = min(min(s.first_loss - 1 if s.num_loss_tokens else s.num_tokens, s.num_tokens - 2) for s in samples)
    if rows <= 0:
        return 0
    first = samples[0].head(rows)
    for other in samples[1:]:
        differs = np.flatnonzero(first[:rows] != other.head(rows))
        rows = int(differs[0]) if len(differs) else rows
    return max(rows, 0) // multiple * multiple


def deal(
    samples: Sequence[Packable],
    *,
    max_rows: int,
    dp_size: int,
    multiple: int,
    min_bins: int,
    row_multiple: int,
    length_multiple: int = 1,
    is_sharing: bool,
    cost: RowCost,
) -> tuple[list[list[list[Part]]], PackingReport]:
    """Bins of every replica, equally many, and what they are like.

    Args:
        samples: of one optimiser step.
        max_rows: of one bin.
        dp_size: replicas.
        multiple: the number of bins a replica is a multiple of it.
        min_bins: a replica gets at least so many where there are samples enough; more than 1 means a pipeline, whose
            pace is that of its largest bin.
        row_multiple: what every sequence or segment is padded to.
        length_multiple: what every bin is padded to.
        is_sharing: whether samples of one ``group_id`` share their common rows.
        cost: of rows.

    Raises ValueError for a sample that does not fit into a bin (nothing is cut).
    """
    rows = [round_up(s.num_tokens - 1, row_multiple) for s in samples]
    for i, n in enumerate(rows):
        if n > max_rows:
            raise ValueError(
                f"sample {i} has {n} tokens, more than the {max_rows} of a microbatch: "
                "raise trainer.max_tokens_per_microbatch or shorten prompts and responses"
            )
    groups = _groups(samples) if is_sharing else [[i] for i in range(len(samples))]
    make = _PartMaker(samples, row_multiple, cost)
    best: tuple[float, list[list[list[Part]]]] | None = None
    for limit in _CUTS if any(len(g) > 1 for g in groups) else _CUTS[:1]:
        parts = _parts(groups, make, limit=limit, num_bins=dp_size * min_bins, max_rows=max_rows)
        least = min(min_bins, -(-len(samples) // dp_size))
        of_length = length_multiple if min_bins > 1 else None
        replicas = _fill(parts, max_rows, dp_size, multiple, least, length_multiple=of_length)
        time = _time(replicas, is_pipeline=min_bins > 1)
        if best is None or time < best[0] * _WORTH_CUTTING:
            best = time, replicas
    assert best is not None
    return best[1], _report(best[1], plain_rows=sum(rows), num_groups=len(groups))


def even_bins(rows: Sequence[int], costs: Sequence[float], *, num_bins: int, max_rows: int) -> list[list[int]] | None:
    """Indices of the items of each of ``num_bins`` bins, the costliest first; None if they do not fit in.

    Each item goes where the least work lies; where that leaves one without room, the longest first to where least is
    left (best fit), which fills bins higher and less evenly.
    """
    costliest_first = sorted(range(len(rows)), key=lambda i: (-costs[i], i))
    bins = _put(costliest_first, rows, costs, num_bins, max_rows, tight=False)
    if bins is None:
        longest_first = sorted(range(len(rows)), key=lambda i: (-rows[i], i))
        bins = _put(longest_first, rows, costs, num_bins, max_rows, tight=True)
        for b in bins or ():
            fullest = max(bins or (), key=len)
            if not b and len(fullest) > 1:
                b.append(fullest.pop())
    return bins


def _put(
    order: Sequence[int], rows: Sequence[int], costs: Sequence[float], num_bins: int, max_rows: int, *, tight: bool
) -> list[list[int]] | None:
    room, load = np.full(num_bins, max_rows), np.zeros(num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for i in order:
        b = int(np.argmin(np.where(room >= rows[i], room if tight else load, np.inf)))
        if room[b] < rows[i]:
            return None
        room[b] -= rows[i]
        load[b] += costs[i]
        bins[b].append(i)
    return bins


def _even_out(
    bins: list[list[int]], rows: Sequence[int], costs: Sequence[float], *, max_rows: int, enough: float = 0.0
) -> None:
    """Let the costliest bin exchange items with another, as long as both become cheaper than it was.

    With three or four items a bin, filling alone leaves the costliest a sixth above the mean.  First one item for one
    or none, then any of the one for any of the other, a few items of each.  It ends when the costliest is at
    ``enough`` and none is empty.
    """
    size, cost = np.array(rows, np.int64), np.array(costs, float)
    load = np.array([cost[b].sum() for b in bins])
    room = max_rows - np.array([size[b].sum() for b in bins], np.int64)
    left = _EXCHANGES_WORK
    for _ in range(_EXCHANGES * len(bins)):
        top = int(load.argmax())
        if not bins[top] or (load[top] <= enough and load.min() > 0):
            return
        for most in (1, _FEW_ITEMS):
            found, looked_at = _best_exchange(bins, top, size, cost, load, room, most=most)
            left -= looked_at
            if found or left <= 0:
                break
        if not found or left <= 0:
            return
        other, given, taken = found
        bins[top] = [i for i in bins[top] if i not in given] + taken
        bins[other] = [i for i in bins[other] if i not in taken] + given
        for b in (top, other):
            load[b], room[b] = cost[bins[b]].sum(), max_rows - size[bins[b]].sum()


def _best_exchange(
    bins: list[list[int]],
    top: int,
    size: np.ndarray,
    cost: np.ndarray,
    load: np.ndarray,
    room: np.ndarray,
    *,
    most: int,
) -> tuple[tuple[int, list[int], list[int]] | None, int]:
    """The bin to exchange with, what it gets and what it gives, at most ``most`` items each; and how many were looked
    at.
    """
    seen = [items if most == 1 else items[:most] for items in bins]
    width = max(map(len, seen))
    mine, theirs = _choices(len(seen[top]), most), _choices(width, most)
    table = np.full((len(bins), width), -1)
    for b, items in enumerate(seen):
        table[b, : len(items)] = items
    moved = (mine @ cost[seen[top]])[None, :, None] - (np.where(table < 0, 0.0, cost[table]) @ theirs.T)[:, None, :]
    grown = (mine @ size[seen[top]])[None, :, None] - (np.where(table < 0, 0, size[table]) @ theirs.T)[:, None, :]
    peak = np.maximum(load[top] - moved, load[:, None, None] + moved)
    peak[(grown > room[:, None, None]) | (-grown > room[top])] = np.inf
    peak[top] = np.inf
    other, i, j = np.unravel_index(int(peak.argmin()), peak.shape)
    if not peak[other, i, j] < load[top] * (1 - _SMALLEST_GAIN):
        return None, peak.size
    given = [item for item, is_in in zip(seen[top], mine[i], strict=True) if is_in]
    taken = [item for item, is_in in zip(seen[other], theirs[j], strict=False) if is_in]
    return (int(other), given, taken), peak.size


@cache
def _choices(count: int, most: int) -> np.ndarray:
    """int64 ``[n, count]``: which of ``count`` items are chosen, none or one of them, or in every way."""
    if most == 1:
        return np.vstack([np.zeros((1, count), np.int64), np.eye(count, dtype=np.int64)])
    return np.arange(1 << count)[:, None] >> np.arange(count) & 1


class _PartMaker:
    """Parts of samples, each made once."""

    def __init__(self, samples: Sequence[Packable], row_multiple: int, cost: RowCost) -> None:
        self.samples, self.multiple, self.cost = samples, row_multiple, cost
        self._made: dict[tuple[int, ...], Part] = {}

    def __call__(self, members: tuple[int, ...]) -> Part:
        if members not in self._made:
            samples = [self.samples[i] for i in members]
            shared = shared_rows(samples, multiple=self.multiple)
            own = [round_up(s.num_tokens - 1 - shared, self.multiple) for s in samples]
            work = [self.cost(n, above=shared, loss_rows=s.num_loss_tokens) for n, s in zip(own, samples, strict=True)]
            self._made[members] = Part(
                members=members, shared=shared, rows=shared + sum(own), cost=self.cost(shared) + sum(work)
            )
        return self._made[members]


def _groups(samples: Sequence[Packable]) -> list[list[int]]:
    """Samples by ``group_id``; one that belongs to none is alone."""
    groups: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group_id if sample.group_id >= 0 else -1 - i, []).append(i)
    return list(groups.values())


def _parts(
    groups: Sequence[Sequence[int]],
    make: Callable[[tuple[int, ...]], Part],
    *,
    limit: float,
    num_bins: int,
    max_rows: int,
) -> list[Part]:
    """Every group in as few parts as keep each below ``limit`` mean bins and within ``max_rows``."""
    whole = [make(tuple(group)) for group in groups]
    most = limit * sum(part.cost for part in whole) / num_bins
    parts = []
    for group, part in zip(groups, whole, strict=True):
        count = min(max(-(-part.rows // max_rows), int(np.ceil(part.cost / most))), len(group))
        cut = _cut(group, count, make)
        while any(p.rows > max_rows for p in cut):
            count += 1
            cut = _cut(group, count, make)
        parts += cut
    return parts


def _cut(group: Sequence[int], count: int, make: Callable[[tuple[int, ...]], Part]) -> list[Part]:
    if count == 1:
        return [make(tuple(group))]
    alone = {i: make((i,)).cost for i in group}
    dealt: list[list[int]] = [[] for _ in range(count)]
    for place, i in enumerate(sorted(group, key=lambda i: (-alone[i], i))):
        dealt[_snake(place, count)].append(i)
    return [make(tuple(sorted(part))) for part in dealt if part]


def _fill(
    parts: Sequence[Part], max_rows: int, dp_size: int, multiple: int, min_bins: int, *, length_multiple: int | None
) -> list[list[list[Part]]]:
    """``[replica][bin]``."""
    rows, costs = [p.rows for p in parts], [p.cost for p in parts]
    fewest = round_up(max(-(-sum(rows) // (max_rows * dp_size)), min_bins, 1), multiple)
    while (bins := even_bins(rows, costs, num_bins=fewest * dp_size, max_rows=max_rows)) is None:
        fewest += multiple
    if length_multiple is None:
        _even_out(bins, rows, costs, max_rows=max_rows)
    else:
        bins = _of_one_length(bins, rows, max_rows, dp_size, multiple, length_multiple)
    work = [sum(costs[i] for i in b) for b in bins]
    replicas: list[list[list[Part]]] = [[] for _ in range(dp_size)]
    for place, b in enumerate(sorted(range(len(bins)), key=lambda b: (-work[b], b))):
        replicas[_snake(place, dp_size)].append([parts[i] for i in bins[b]])
    return replicas


def _of_one_length(
    bins: list[list[int]], rows: Sequence[int], max_rows: int, dp_size: int, multiple: int, length_multiple: int
) -> list[list[int]]:
    """``bins`` made even, or more of them, for a pipeline: all are as long as the longest, and that a multiple, so that
    what counts is their number times that length.
    """
    fewest, total = len(bins) // dp_size, sum(rows)

    def length(longest: int) -> int:
        return round_up(max(longest, 1), length_multiple)

    best, least = bins, math.inf
    for count in range(fewest, fewest + _MORE_BINS * multiple + 1, multiple):
        num_bins = count * dp_size
        aim = length(-(-total // num_bins))
        if count * aim >= least:
            continue
        more = bins if count == fewest else even_bins(rows, rows, num_bins=num_bins, max_rows=max_rows)
        if more is None or (count > fewest and not all(more)):
            continue
        _even_out(more, rows, rows, max_rows=max_rows, enough=aim)
        found = count * length(max(sum(rows[i] for i in items) for items in more))
        if found < least:
            best, least = more, found
    return best


def _snake(place: int, width: int) -> int:
    """0 1 2 2 1 0 0 1 2 ...: dealing what is sorted, so that nobody has the larger one every time."""
    turn, column = divmod(place, width)
    return column if turn % 2 == 0 else width - 1 - column


def _work(replicas: Sequence[Sequence[Sequence[Part]]]) -> list[list[float]]:
    return [[sum(part.cost for part in b) for b in bins] for bins in replicas]


def _time(replicas: Sequence[Sequence[Sequence[Part]]], *, is_pipeline: bool) -> float:
    """Of the slowest replica."""
    return max(max(bins) * len(bins) if is_pipeline else sum(bins) for bins in _work(replicas))


def _report(replicas: Sequence[Sequence[Sequence[Part]]], *, plain_rows: int, num_groups: int) -> PackingReport:
    work = _work(replicas)
    bins = [b for replica in replicas for b in replica]
    parts = [part for b in bins for part in b]
    mean = sum(map(sum, work)) / len(work)
    return PackingReport(
        num_microbatches=len(replicas[0]),
        num_empty=sum(not b for b in bins),
        rows=sum(part.rows for part in parts),
        plain_rows=plain_rows,
        prompt_copies=len(parts) / num_groups if num_groups else 1.0,
        imbalance=max(map(sum, work)) / mean if mean else 1.0,
    )
