"""The reference policy of a KL term: the weights a run began with, frozen, scored through the policy's own modules.

It has the policy's layout by construction and costs host memory, no device memory: the weights are kept on the host,
and for a scoring pass they change places with the trained ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rest.mcore.policy import MegatronPolicy
from megatron_rest.types import MicroBatch

__all__ = ["ReferencePolicy"]


class ReferencePolicy:
    """A copy of ``policy``'s weights as they are now, which are ``model.path``'s if nothing was loaded or trained yet.

    Args:
        policy: whose modules score.  Parameters must be plain tensors (``precision.parameters=false``; the
            configuration refuses the other).

    Host memory: this rank's parameters once, and once more during :meth:`log_probs`.
    """

    def __init__(self, policy: MegatronPolicy) -> None:
        self._policy = policy
        self._frozen = {name: _to_host(parameter) for name, parameter in policy.named_parameters()}

    def log_probs(self, microbatches: Sequence[MicroBatch]) -> list[Tensor]:
        """float32 ``[T]`` on the CPU of each microbatch: the reference's log-probs of the labels, nats, at the sampling
        temperature; no gradient.

        The trained weights are afterwards what they were, bit for bit, also if scoring fails.  Collectives: those of
        :meth:`MegatronPolicy.score`.
        """
        with self._in_place():
            return [scores.log_probs.cpu() for scores in self._policy.score(microbatches)]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        trained = {name: _to_host(parameter) for name, parameter in self._policy.named_parameters()}
        try:
            self._put(self._frozen)
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._policy.named_parameters():
            parameter.copy_(values[name])  # in place: optimiser, DDP and engines hold views of this memory


def _to_host(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True)
