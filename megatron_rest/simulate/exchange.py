"""Bytes of a step's rollouts on their way from the engines' owners to every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.trainer.exchange import pack_rollouts
from megatron_rest.types import Rollout, StopReason

__all__ = ["Exchange", "simulate_exchange"]

_INFORMATION = 9  # bytes a token: id, log-prob, the version that sampled it
_PACKED = 1 << 18  # tokens that are packed for it; what is there is proportional


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """Of one step."""

    received: int  # bytes that a rank receives, whatever the number of ranks
    information: int  # bytes of what the rollouts say

    @property
    def ratio(self) -> float:
        return self.received / self.information


def simulate_exchange(*, rollouts: int, response: int, world_size: int) -> Exchange:
    """Of ``rollouts`` responses of ``response`` tokens each, from the trainer's own packing of a part of them."""
    count = max(_PACKED // response, 1)
    one = Rollout(
        prompt_id="p",
        token_ids=np.zeros(response, np.int32),
        log_probs=np.zeros(response, np.float32),
        loss_mask=np.ones(response, bool),
        stop_reason=StopReason.EOS,
        policy_version=0,
    )
    packed = pack_rollouts(dict.fromkeys(range(count), one)).numel()
    sizes = 8 * world_size  # one number of every rank
    return Exchange(received=round(packed * rollouts / count) + sizes, information=_INFORMATION * rollouts * response)
