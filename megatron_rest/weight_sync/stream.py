"""Whole tensors: the source's stream on every rank, handed by reference to an engine in its process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from megatron_rest.weight_sync.digest import digest
from megatron_rest.weight_sync.engine_side import fp8_form, introductions
from megatron_rest.weight_sync.fp8 import quantised_stream
from megatron_rest.weight_sync.layouts import Fp8Form
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weight_sync.transport import Outcome, SyncTarget, Tamper

__all__ = ["StreamTransport"]


class StreamTransport:
    """Transport ``local``: every rank iterates the source; an engine pulls the tensors from the stream of its rank.

    A rank whose engine fails goes on iterating, because the gathers are collectives.
    """

    def __init__(self, source: MegatronWeightSource) -> None:
        self._source = source
        self._form: Fp8Form | None = None  # what the engines hold in FP8; all of them alike

    def connect(self, engine: SyncTarget | None) -> None:
        """Raises ConnectionError when an engine cannot be asked, ValueError when its quantisation is unknown or engines
        differ in it."""
        layouts = [hello.layout for hello in introductions(self._source, engine)]
        forms = {fp8_form(self._source.shape, layout) for layout in layouts if layout is not None}
        if len(forms) > 1:
            raise ValueError("some engines hold matrices in FP8 and others do not: give all the same rollout config")
        self._form = next(iter(forms), None)
        if engine is not None:
            engine.init_weight_transfer({})

    def attempt(self, engine: SyncTarget | None, *, detailed: bool, tamper: Tamper | None) -> Outcome:
        """Digests are taken of every tensor anyway: ``detailed`` changes nothing."""
        sent = _Pass(self._source, self._form, tamper)
        stream = iter(sent)
        outcome = Outcome()
        received: list[dict[str, Any]] = []
        started = time.perf_counter()
        try:
            if engine is not None:
                engine.start_weight_update()
                started = time.perf_counter()
                engine.update_weights({"weights": stream})
                outcome.transfer_seconds = time.perf_counter() - started
                engine.finish_weight_update()
                received = engine.received_weights()
        except Exception as e:  # noqa: BLE001  raised by WeightSync after all ranks have agreed; alone it would strand them
            outcome.error = e
        for _ in stream:  # what the engine did not take: the gathers are collectives
            pass
        outcome.non_finite = sent.non_finite
        wrong = list(self._source.faults)
        for worker in received:
            got = {name: tuple(value) for name, value in worker["digests"].items()}  # an RPC makes lists of tuples
            wrong += [name for name, value in sent.digests.items() if got.get(name) != value]
            wrong += [f"{name} (engine parameter that nothing was sent for)" for name in worker["missing"]]
        outcome.wrong = list(dict.fromkeys(wrong))
        outcome.num_bytes, outcome.num_tensors = sent.num_bytes, len(sent.digests)
        outcome.checksum = hashlib.blake2b(repr(list(sent.digests.items())).encode(), digest_size=8).hexdigest()
        outcome.gather_seconds = sent.gather_seconds
        return outcome

    def close(self) -> None:
        """Nothing is connected."""


class _Pass:
    """One pass over the source, with the digest of every tensor that leaves."""

    def __init__(self, source: MegatronWeightSource, form: Fp8Form | None, tamper: Tamper | None) -> None:
        self._source, self._form, self._tamper = source, form, tamper
        self.non_finite: list[str] = []
        self.digests: dict[str, tuple[int, int]] = {}
        self.num_bytes = 0
        self.gather_seconds = 0.0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        tensors = iter(self._source)
        if self._form is not None:
            tensors = quantised_stream(tensors, self._form, self.non_finite)
        while True:
            waited = time.perf_counter()
            item = next(tensors, None)
            self.gather_seconds += time.perf_counter() - waited
            if item is None:
                return
            name, tensor = item
            self.digests[name] = digest(tensor)
            self.num_bytes += tensor.numel() * tensor.element_size()
            yield name, tensor if self._tamper is None else self._tamper(name, tensor)
