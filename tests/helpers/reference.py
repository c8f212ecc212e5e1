"""Dense float64 references, unsharded and written for reading: what every sharded or fused operator must agree with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DenseTokens", "dense_head_gradient", "dense_tokens", "partition_order_tokens"]


class DenseTokens(NamedTuple):
    """Float64 results of a dense softmax, each in the shape of the labels."""

    log_probs: Tensor
    entropy: Tensor
    collision: Tensor


def dense_tokens(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None
) -> DenseTokens:
    """Log-prob of the label, entropy (nats) and sum p^2 of softmax(logits[..., :vocab_size] / temperature)."""
    log_p = torch.log_softmax(logits.double()[..., :vocab_size] / temperature, dim=-1)
    p = log_p.exp()
    surprise = torch.where(p > 0, p * log_p.clamp(min=-1e300), 0.0)  # p log p -> 0 where a column is -inf
    picked = log_p.gather(-1, labels.long()[..., None])[..., 0]
    return DenseTokens(picked, -surprise.sum(-1), p.square().sum(-1).detach())


def dense_head_gradient(
    logits: Tensor,
    labels: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Gradient of the logits ``[..., V]`` in closed form, float64:  (g 1{label} - p (g + h (log p + H))) / T.

    Written out, not by autograd, so that a mistake in the derivation would show as a difference from autograd of
    :func:`dense_tokens` (tests compare the two).  Columns beyond ``vocab_size`` and -inf columns get zero.
    """
    x = logits.double()[..., :vocab_size] / temperature
    log_p = torch.log_softmax(x, dim=-1)
    p = log_p.exp()
    log_p = torch.where(p > 0, log_p, 0.0)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    g, h = grad_log_probs.double()[..., None], grad_entropy.double()[..., None]
    gradient = -p * (g + h * (log_p + entropy))
    gradient.scatter_add_(-1, labels.long()[..., None], g.expand(*labels.shape, 1).clone())
    out = torch.zeros(logits.shape, dtype=torch.float64)
    out[..., : gradient.shape[-1]] = gradient / temperature
    return out


def partition_order_tokens(logits: Tensor, labels: Tensor, *, num_shards: int, temperature: float = 1.0) -> DenseTokens:
    """The same numbers added up shard by shard in rank order: what is left against an operator is its own error."""
    shards = (logits.double() / temperature).chunk(num_shards, dim=-1)
    m = torch.stack([s.amax(-1) for s in shards]).amax(0)
    z, u, q = (torch.zeros_like(m) for _ in range(3))
    for shard in shards:
        m_i = shard.amax(-1)
        a = shard - m_i[..., None]
        e = a.exp()
        z_i, d = e.sum(-1), m_i - m
        z = z + d.exp() * z_i
        u = u + d.exp() * ((a * e).sum(-1) + d * z_i)
        q = q + (2 * d).exp() * e.square().sum(-1)
    label_logit = (logits.double() / temperature).gather(-1, labels.long()[..., None])[..., 0]
    return DenseTokens((label_logit - m) - z.log(), z.log() - u / z, q / z.square())
