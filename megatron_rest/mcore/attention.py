"""Causal core attention over packed sequences and context-parallel ranks without Transformer Engine.

Megatron's local ``DotProductAttention`` refuses both.  This module takes its place through ``ModuleSpec`` and runs one
causal ``scaled_dot_product_attention`` per packed sequence, so that no [T, T] mask is ever made.  A segment that
continues others (``segments.py``) attends to the keys of those, and to its own.

Context-parallel ranks hold their tokens in zigzag order (``context_parallel.py``).  Keys and values are gathered, once
a layer and as one tensor, before grouped heads are repeated; their gradients are reduce-scattered.  Each of the two
chunks that a rank holds of a sequence then attends to the keys up to its own end.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor

from megatron_rest.mcore.context_parallel import zigzag_order
from megatron_rest.mcore.segments import SegmentParams, ancestors

__all__ = ["PackedCoreAttention"]


class PackedCoreAttention(MegatronModule):
    """Drop-in for ``DotProductAttention``: causal, grouped queries, [s, b, h, d] or packed [t, h, d]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        if (attention_dropout or config.attention_dropout) > 0:
            raise ValueError("attention dropout must be 0: RL compares log-probs of the same network")
        tp = pg_collection.tp.size()
        self.heads_per_group = divide(config.num_attention_heads, tp) // divide(config.num_query_groups or tp, tp)
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """``query`` [s, b, h, d] or [t, h, d], of this context-parallel rank.

        ``key``, ``value`` with h / group heads.  Returns [s, b, h*d] or [t, h, d].  Collectives: with CP > 1 one
        all-gather of keys and values, in the backward pass one reduce-scatter.
        """
        if attention_bias is not None or attention_mask is not None:
            raise ValueError("PackedCoreAttention is causal only: attention_mask and attention_bias must be None")
        packed = packed_seq_params is not None
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            is_shared = isinstance(packed_seq_params, SegmentParams)
            bounds = packed_seq_params.bounds if is_shared else packed_seq_params.cu_seqlens_q.tolist()
            parents = packed_seq_params.parents if is_shared else ()
        else:
            bounds, parents = (0, query.size(0) * self.cp_group.size()), ()
        lengths = [end - start for start, end in pairwise(bounds)]
        if self.cp_group.size() > 1:
            key, value = self._whole_sequences(key, value, torch.tensor(lengths))
        if self.heads_per_group > 1:
            key = key.repeat_interleave(self.heads_per_group, dim=2)
            value = value.repeat_interleave(self.heads_per_group, dim=2)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, h, s, d]
        # Split, not sliced: the gradient of every slice would be as large as the whole microbatch.
        chunks = [_chunks(length, self.cp_group.rank(), self.cp_group.size()) for length in lengths]
        queries = iter(q.split([size for parts in chunks for size, _ in parts], dim=2))
        keys, values = k.split(lengths, dim=2), v.split(lengths, dim=2)
        outs = []
        for i, parts in enumerate(chunks):
            above = ancestors(parents, i)
            for _, end in parts:
                key_seen, value_seen = (_behind([x[j] for j in above], x[i][:, :, :end]) for x in (keys, values))
                outs.append(_causal_attention(next(queries), key_seen, value_seen, self.scale))
        out = torch.cat(outs, dim=2).permute(2, 0, 1, 3).contiguous()  # [s, b, h, d]
        return out.squeeze(1) if packed else out.view(out.size(0), out.size(1), -1)

    def _whole_sequences(self, key: Tensor, value: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all ranks, [s * CP, b, h, d], in sequence order."""
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.cp_group)
        place = zigzag_order(lengths, self.cp_group.size()).flatten().argsort()
        key, value = both.index_select(0, place.to(both.device)).chunk(2, dim=-1)
        return key, value

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing to save: there are no parameters."""
        return {}


def _behind(above: list[Tensor], own: Tensor) -> Tensor:
    """What a segment sees: those that it continues, then itself.  Not copied if there are none."""
    return torch.cat([*above, own], dim=2) if above else own


def _chunks(length: int, cp_rank: int, cp_size: int) -> list[tuple[int, int | None]]:
    """(queries that this rank has, keys up to the last of them; None = all) of the chunks of one sequence."""
    if cp_size == 1:
        return [(length, None)]
    chunk = length // (2 * cp_size)
    return [(chunk, (number + 1) * chunk) for number in (cp_rank, 2 * cp_size - 1 - cp_rank)]


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[b, h, n, d]: the queries are the last n positions of the keys."""
    n, m = query.size(2), key.size(2)
    mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
