"""The policy head: log-probs and entropy over a sharded vocabulary, from torch tensors and process groups alone."""

from megatron_rest.ops.fused_linear import linear_log_probs_and_entropy
from megatron_rest.ops.policy_step import ClippedTokenLoss, PolicyStep, TokenLoss, policy_step
from megatron_rest.ops.vocab_parallel import TokenLogProbs, vocab_parallel_log_probs_and_entropy

__all__ = [
    "ClippedTokenLoss",
    "PolicyStep",
    "TokenLogProbs",
    "TokenLoss",
    "linear_log_probs_and_entropy",
    "policy_step",
    "vocab_parallel_log_probs_and_entropy",
]
