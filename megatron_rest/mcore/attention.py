"""Causal core attention over packed sequences without Transformer Engine.

Megatron's local ``DotProductAttention`` refuses packed sequences.  This module takes its place through ``ModuleSpec``
and runs one causal ``scaled_dot_product_attention`` per packed sequence, so that no [T, T] mask is ever made.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor

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
        if pg_collection.cp.size() > 1:
            raise ValueError(
                "PackedCoreAttention does not split sequences: context parallelism needs Transformer Engine"
            )
        if (attention_dropout or config.attention_dropout) > 0:
            raise ValueError("attention dropout must be 0: RL compares log-probs of the same network")
        tp = pg_collection.tp.size()
        self.heads_per_group = divide(config.num_attention_heads, tp) // divide(config.num_query_groups or tp, tp)
        self.scale = softmax_scale

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
        """``query`` [s, b, h, d] or [t, h, d].

        ``key``, ``value`` with h / group heads.  Returns [s, b, h*d] or [t, h, d].
        """
        if attention_bias is not None or attention_mask is not None:
            raise ValueError("PackedCoreAttention is causal only: attention_mask and attention_bias must be None")
        packed = packed_seq_params is not None
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            bounds = packed_seq_params.cu_seqlens_q.tolist()
        else:
            bounds = [0, query.size(0)]
        if self.heads_per_group > 1:
            key = key.repeat_interleave(self.heads_per_group, dim=2)
            value = value.repeat_interleave(self.heads_per_group, dim=2)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, h, s, d]
        outs = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, scale=self.scale)
            for a, b in pairwise(bounds)
        ]
        out = torch.cat(outs, dim=2).permute(2, 0, 1, 3).contiguous()  # [s, b, h, d]
        return out.squeeze(1) if packed else out.view(out.size(0), out.size(1), -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing to save: there are no parameters."""
        return {}
