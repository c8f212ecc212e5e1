"""Lengths that packed microbatches must have, by FP8 recipe and layout.  Pure arithmetic: no torch, no FP8.

The matrix product that Transformer Engine runs in FP8 takes tensors whose token dimension is a multiple of the
recipe's block.  Under sequence parallelism the shard ``tokens / (CP x TP)`` of a rank is quantised *before* it is
gathered, so the shard has to be a multiple, not the gathered tensor.  Context parallelism deals every sequence out in
``2 x CP`` equal chunks.  Wrong lengths do not always fail: some corrupt the result silently.

Transformer Engine's forward check asks for 8 tokens only, but the weight gradient sums over tokens and wants 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rest.config import Fp8Recipe, ParallelConfig
from megatron_rest.fp8_support import REQUIREMENTS

__all__ = ["TOKEN_BLOCK", "UNALIGNED", "PackingAlignment", "packing_alignment", "round_up"]

TOKEN_BLOCK = {Fp8Recipe.NONE: 1, **{recipe: need.block for recipe, need in REQUIREMENTS.items()}}
"""Tokens a shard of a matrix product must be a multiple of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingAlignment:
    """Tokens: every sequence of a packed microbatch is padded to a multiple of ``sequence``, their sum to ``total``.

    ``total`` is a multiple of ``sequence``, so that what fills up a microbatch is a valid sequence itself.
    """

    sequence: int
    total: int


UNALIGNED = PackingAlignment(sequence=1, total=1)


def packing_alignment(recipe: Fp8Recipe, parallel: ParallelConfig) -> PackingAlignment:
    """Least alignment at which every local shard of every product is a multiple of the recipe's block."""
    context = parallel.context_parallel
    shards = context * (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    sequence = 2 * context if context > 1 else 1
    return PackingAlignment(sequence=sequence, total=math.lcm(sequence, TOKEN_BLOCK[recipe] * shards))


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple
