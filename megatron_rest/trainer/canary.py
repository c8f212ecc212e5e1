"""After every weight transfer: does the engine compute what the trainer computes?

Checksums prove that bytes arrived; only log-probs prove that they arrived in the right place (a transposed fusion or
a stale tied head passes every checksum).  The engine of rank 0 samples a few greedy tokens after a fixed prompt,
every engine scores that sequence, and the trainer scores it through its own pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_rest.data.alignment import UNALIGNED, PackingAlignment
from megatron_rest.data.batching import make_microbatch
from megatron_rest.mcore.policy import MegatronPolicy
from megatron_rest.rollout.engine import EngineLostError, RolloutEngine
from megatron_rest.types import PromptSample, TokenRegion, TrainSample

__all__ = ["Canary", "CanaryError"]


class CanaryError(RuntimeError):
    """Engine and trainer disagree on the log-probs of the same tokens under what should be the same weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """A prompt whose continuation both engines must agree on.

    Args:
        prompt: any prompt of the data set.
        num_tokens: greedy tokens sampled after it.
        tolerance: largest allowed |log-prob difference|, nats.
    """

    prompt: PromptSample
    num_tokens: int
    tolerance: float

    def check(
        self,
        engine: RolloutEngine | None,
        policy: MegatronPolicy,
        *,
        is_first: bool,
        alignment: PackingAlignment = UNALIGNED,
    ) -> float | None:
        """Largest |engine - trainer| log-prob over all ranks' engines; raises :class:`CanaryError` above the tolerance.

        None, on every rank, when an engine was lost meanwhile.  ``is_first``: this rank has the first engine, which
        samples, or a part of it (rank 0 does); others may have none.
        Collective over all ranks: one broadcast of token ids, a scoring pass, one MAX all-reduce.
        """
        tokens = torch.zeros(self.num_tokens, dtype=torch.int64)
        is_lost = False
        if is_first:
            assert engine is not None, "what has the first engine has one"
            try:
                sampled, _ = engine.greedy(self.prompt.token_ids, self.num_tokens)
                tokens[:] = torch.from_numpy(np.asarray(sampled, np.int64))
            except EngineLostError:
                is_lost = True  # the ranks agree on it below: alone it would leave the others waiting
        dist.broadcast(tokens, src=0)
        sequence = np.concatenate([self.prompt.token_ids, tokens.numpy()]).astype(np.int32)
        trained = self._trainer_log_probs(policy, sequence, alignment)
        gap = torch.zeros(1)
        try:
            if engine is not None and not is_lost:
                scored = torch.from_numpy(np.array(engine.prompt_log_probs(sequence), np.float32))
                gap = (scored[-self.num_tokens :] - trained[-self.num_tokens :]).abs().max().reshape(1)
        except EngineLostError:
            is_lost = True
        outcome = torch.cat([torch.nan_to_num(gap, nan=torch.inf), torch.tensor([float(is_lost)])])
        dist.all_reduce(outcome, op=dist.ReduceOp.MAX)
        worst, any_lost = outcome.tolist()
        if any_lost:
            return None
        if not worst <= self.tolerance:
            raise CanaryError(
                f"after the weight transfer the engine's log-probs differ from the trainer's by {worst:.3g} nats on "
                f"the canary prompt (allowed: {self.tolerance:g}, weight_sync.canary_tolerance)"
            )
        return worst

    def _trainer_log_probs(
        self, policy: MegatronPolicy, sequence: np.ndarray, alignment: PackingAlignment
    ) -> torch.Tensor:
        n = len(sequence)
        sample = TrainSample(
            token_ids=sequence,
            loss_mask=np.arange(n) >= n - self.num_tokens,
            region_ids=np.full(n, int(TokenRegion.CONTEXT), np.int8),
            rollout_log_probs=np.zeros(n, np.float32),
            advantage=0.0,
            sequence_id=0,
        )
        # Engines score given tokens with the model's own distribution, whatever the sampling temperature is, and in
        # their own precision: what FP8 products change is the certificate's business, not a sign of wrong weights.
        [scores] = policy.score([make_microbatch([sample], alignment=alignment)], temperature=1.0, in_bf16=True)
        return scores.log_probs.cpu()[: n - 1]
