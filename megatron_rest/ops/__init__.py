"""The policy head: log-probs and entropy over a sharded vocabulary, from torch tensors and process groups alone."""

from megatron_rest.ops.vocab_parallel import TokenLogProbs, vocab_parallel_log_probs_and_entropy

__all__ = ["TokenLogProbs", "vocab_parallel_log_probs_and_entropy"]
