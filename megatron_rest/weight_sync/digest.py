"""A digest of a tensor's bytes: cheap where the tensor lives, and changed by any single changed byte.

The bytes are read as 64-bit words (zeros behind the last one) and laid out as a matrix of ``_COLUMNS`` columns.  With
row sums ``r_i`` and column sums ``c_j``, all modulo 2**64:

    digest = (sum_i r_i,  sum_i (2 i + 1) r_i + 2**32 * sum_j (2 j + 1) c_j)

A changed byte changes one word by a non-zero ``d * 2**k`` with ``|d| < 2**8`` and ``k <= 56``, hence the first sum.
The second one notices words that swapped places: shards in the wrong order, a slice taken at the wrong offset.  This
is a check against faults, not against an adversary.  Both sums read a block while it is in the cache, so the bytes come
from memory once: about 10 GiB/s on one CPU core (crc32: 4), and no copy to the host on a GPU.  Both ends must use this
function.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["WORD_BYTES", "digest", "digest_tensor"]

WORD_BYTES = 8
_BLOCK_ROWS = 16  # 512 KiB: half of a second-level cache
_COLUMNS = 4096  # rows of 32 KiB: long enough for the memory to be read ahead


def digest_tensor(tensor: Tensor) -> Tensor:
    """int64 [2] on the tensor's device; ``tensor`` may have any shape and dtype.  No host synchronisation."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    remainder = data.numel() % WORD_BYTES
    # The tail, and storage that does not start on a word, cannot be viewed as words: pad or copy.
    if remainder:
        data = torch.cat([data, data.new_zeros(WORD_BYTES - remainder)])
    elif data.storage_offset() % WORD_BYTES:
        data = data.clone()
    words = data.view(torch.int64)
    full = words.numel() // _COLUMNS * _COLUMNS
    matrix, rest = words[:full].view(-1, _COLUMNS), words[full:]
    # On CPU the second sum of a block finds it in the cache; a GPU takes the whole matrix at once.
    blocks = matrix.split(_BLOCK_ROWS) if matrix.device.type == "cpu" else (matrix,)
    sums = [(block.sum(0), block.sum(1)) for block in blocks]
    columns = torch.stack([column for column, _ in sums]).sum(0)
    columns[: rest.numel()] += rest
    rows = torch.cat([*(row for _, row in sums), rest.sum().view(1)])
    weights_of_rows, weights_of_columns = _odd(rows.numel(), rows.device), _odd(_COLUMNS, rows.device)
    weighted = (rows * weights_of_rows).sum() + (columns * weights_of_columns).sum() * 2**32
    return torch.stack([rows.sum(), weighted])


def digest(tensor: Tensor) -> tuple[int, int]:
    """:func:`digest_tensor` as two Python integers."""
    first, second = digest_tensor(tensor).tolist()
    return int(first), int(second)


@functools.lru_cache(maxsize=64)
def _odd(count: int, device: torch.device) -> Tensor:
    """1, 3, 5, ...; a transfer asks for the same few lengths again and again."""
    return 2 * torch.arange(count, dtype=torch.int64, device=device) + 1
