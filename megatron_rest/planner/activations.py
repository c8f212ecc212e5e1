"""What one layer keeps between its forward and its backward pass, bytes a token, name by name.

Two lists, because two implementations keep different things: Transformer Engine with a flash-attention kernel (GPU),
and torch's own operators (CPU, also what the numbers can be checked against by measuring).  ``t`` is TP, ``s`` is TP
under sequence parallelism and 1 without; ``q``, ``kv`` are widths of all query and of all key (or value) heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rest.config import ParallelConfig
from megatron_rest.model_map import ModelShape

__all__ = ["LayerBytes", "layer_bytes"]

_FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBytes:
    """Bytes a token of one layer on one rank."""

    input: int  # the residual stream that enters: all that full recomputation keeps
    attention: dict[str, int]
    mlp: dict[str, int]

    def kept(self, recompute: str) -> int:
        """Kept from forward to backward under ``parallel.recompute``."""
        if recompute == "full":
            return self.input
        mlp = self.mlp["residual"] + self.mlp["norm"] if recompute == "mlp" else sum(self.mlp.values())
        return self.input + sum(self.attention.values()) + mlp

    def recomputed(self, recompute: str) -> int:
        """Exists while one layer is being recomputed."""
        return self.kept("none") - self.kept(recompute)


def layer_bytes(
    shape: ModelShape, parallel: ParallelConfig, *, itemsize: int, is_fp8: bool, is_cpu: bool
) -> LayerBytes:
    """Bytes a token of the layer that keeps most (with experts, if the model has any)."""
    return _local(shape, parallel, itemsize) if is_cpu else _transformer_engine(shape, parallel, itemsize, is_fp8)


def _widths(shape: ModelShape, parallel: ParallelConfig) -> tuple[int, int, int, int, int]:
    """Numbers a token and rank: residual (sharded by s), hidden as a product takes it, q, kv, feed-forward."""
    t = parallel.tensor_parallel
    s = t if parallel.sequence_parallel else 1
    q = shape.num_attention_heads * shape.head_dim // t
    kv = shape.num_query_groups * shape.head_dim // t
    if shape.num_experts:  # every token visits k experts, which are not cut: its k copies lie on the ranks of EP
        ffn = shape.moe_ffn_hidden_size * shape.num_experts_per_token // s
    else:
        ffn = shape.ffn_hidden_size // t
    return shape.hidden_size // s, shape.hidden_size // s, q, kv, ffn


def _transformer_engine(shape: ModelShape, parallel: ParallelConfig, itemsize: int, is_fp8: bool) -> LayerBytes:
    residual, hidden, q, kv, ffn = _widths(shape, parallel)
    product_input = 1 if is_fp8 else itemsize  # what the weight gradient multiplies is kept as it was multiplied
    heads = shape.num_attention_heads // parallel.tensor_parallel
    attention = {
        "norm": hidden * product_input,
        "mixed qkv": (q + 2 * kv) * itemsize,  # the value heads are a view of it
        "rotated q, k": (q + kv) * itemsize,
        "attention output": q * (itemsize + 1 if is_fp8 else itemsize),
        "softmax statistics": heads * _FP32,
    }
    if shape.has_qk_norm:
        attention["q before its norm"] = q * itemsize
    mlp = {
        "residual": residual * itemsize,
        "norm": hidden * product_input,
        "gate, up": 2 * ffn * itemsize,
        "activation": ffn * product_input,
    }
    if shape.num_experts:
        mlp |= _routing(shape, parallel, itemsize)
    return LayerBytes(input=residual * itemsize, attention=attention, mlp=mlp)


def _local(shape: ModelShape, parallel: ParallelConfig, itemsize: int) -> LayerBytes:
    """Megatron's local modules: torch's RMSNorm, eager rotary embedding and SwiGLU, one SDPA a sequence."""
    residual, hidden, q, kv, ffn = _widths(shape, parallel)
    norm = 2 * _FP32 * hidden  # computed in float32 whatever the model's type: its input, and normalised
    attention = {
        "norm": norm,
        "mixed qkv": (q + 2 * kv) * itemsize,
        "rotated q": q * itemsize,
        "rotation": 4 * shape.head_dim * itemsize,  # cosine and sine, for q and for k
        "repeated k, v": (2 * q if q > kv else kv) * itemsize,
        "attention output": 2 * q * itemsize,  # of SDPA, and the same in the order of tokens
        "softmax statistics": shape.num_attention_heads // parallel.tensor_parallel * _FP32,
    }
    if shape.has_qk_norm:
        attention["norm of q, k"] = _FP32 * (2 * q + (kv if itemsize == _FP32 else 2 * kv))
    mlp = {"residual": residual * itemsize, "norm": norm, "gate, up": 2 * ffn * itemsize, "activation": ffn * itemsize}
    if shape.num_experts:
        mlp |= _routing(shape, parallel, itemsize)
    return LayerBytes(input=residual * itemsize, attention=attention, mlp=mlp)


def _routing(shape: ModelShape, parallel: ParallelConfig, itemsize: int) -> dict[str, int]:
    """Copies of a token at its experts, and the router's probabilities over all of them."""
    s = parallel.tensor_parallel if parallel.sequence_parallel else 1
    copies = shape.num_experts_per_token * shape.hidden_size // s
    return {"tokens at experts": copies * itemsize, "router": 2 * shape.num_experts * _FP32 // s}
