"""What only the ranks together can see of a wrong call: they compare notes once, at the first call with a group.

A group that was given for logits that no rank shares, labels that differ between ranks and shards of unequal width are
wrong in silence otherwise: every rank computes, and no number looks odd.  One all-gather of 64 bytes a rank and one
read of the host, once a group; later calls cost a look into a set.
"""

from __future__ import annotations

import warnings
import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.ops.sharding import VocabShard, all_gather_rows

__all__ = ["check_first_call"]

_SAMPLE = 4096  # elements of the vocabulary-parallel tensor that are compared
_PRIME = 1_000_003
_agreed: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
_warned = False


def check_first_call(shard: VocabShard, labels: Tensor, columns: Tensor, *, names_vocab_size: bool) -> None:
    """Compare this call over ``shard.tp_group``, if it is the group's first.

    Args:
        shard: as this rank takes it.
        labels: of the whole call, before anything is left out.
        columns: logits ``[..., V/TP]`` or the weight ``[V/TP, H]``.
        names_vocab_size: the caller has said the true size; without it, and without a group, several processes that
            compute are told once how the call was read.

    Raises:
        ValueError: on every rank of the group, with the remedy.
    """
    if labels.is_meta or columns.is_meta or torch.compiler.is_compiling():
        return
    group = shard.tp_group
    if group is None:
        _say_how_it_was_read(shard, names_vocab_size)
        return
    if shard.size == 1 or group in _agreed:
        return
    mine = _notes(shard, labels, columns)[None]
    notes = mine.new_empty(shard.size, mine.shape[1])
    all_gather_rows(notes, mine, group)
    rows = [[int(value) for value in row] for row in notes.tolist()]
    _compare(rows, shard)
    _agreed.add(group)


def _notes(shard: VocabShard, labels: Tensor, columns: Tensor) -> Tensor:
    """int64 [8]: width, true size, rows, two sums of labels, two of the shard as bits, whether these say nothing."""
    ids = labels.detach().reshape(-1).long()
    places = torch.arange(1, len(ids) + 1, device=ids.device) % _PRIME
    sample = columns.detach().reshape(-1)[:_SAMPLE].double()
    sums = torch.stack([sample.sum(), (sample * torch.arange(1, len(sample) + 1, device=sample.device)).sum()])
    says_nothing = (sample == sample[:1]).all() | ~sums.isfinite().all()  # zeros, say, are the same on every shard
    known = torch.tensor([shard.local_size, shard.vocab_size, len(ids)], device=ids.device)
    label_sums = torch.stack([ids.sum(), (ids * places).sum()])
    return torch.cat([known, label_sums, sums.view(torch.int64), says_nothing.long()[None]])


def _compare(rows: list[list[int]], shard: VocabShard) -> None:
    widths, sizes, counts = ([row[i] for row in rows] for i in range(3))
    if len(set(widths)) > 1:
        raise ValueError(
            f"the ranks of tp_group hold {widths} columns of the vocabulary: every shard has the same width; pad the "
            "vocabulary to a multiple of the group's size and pass the true vocab_size"
        )
    if len(set(sizes)) > 1:
        raise ValueError(f"the ranks of tp_group were given vocab_size {sizes}: pass the same to each")
    if len({tuple(row[2:5]) for row in rows}) > 1:
        raise ValueError(
            f"the labels differ between the ranks of tp_group (rows: {counts}): every rank passes the labels of all "
            "rows, as global vocabulary ids; is tp_group the tensor-parallel group, and not a data-parallel one?"
        )
    both_real = shard.vocab_size > shard.local_size  # else the second rank has padding only, and its numbers are unread
    if both_real and rows[0][5:7] == rows[1][5:7] and not rows[0][7]:
        raise ValueError(
            f"tp_group says that {shard.size} ranks share the vocabulary, but they hold the same {shard.local_size} "
            "columns: pass tp_group=None for logits (or a weight) that each rank has whole"
        )


def _say_how_it_was_read(shard: VocabShard, names_vocab_size: bool) -> None:
    global _warned
    if _warned or names_vocab_size or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _warned = True
    warnings.warn(
        f"no tp_group and no vocab_size: the {shard.local_size} columns are taken for the whole vocabulary. If ranks "
        "share it, pass tp_group; if not, pass vocab_size, and this is checked from then on",
        stacklevel=4,
    )
