"""One verified transfer of the policy into an engine.

    push(version):  start -> stream tensors, a digest of each at the source -> finish -> fetch the receiver's digests
                    all ranks agree: equal -> prefix cache reset -> the engine holds ``version``
                                     different -> everything is sent once more; different again -> WeightSyncError

Every rank of TP x PP calls :meth:`WeightSync.push` together, whatever happens on it: a rank whose engine fails still
takes part in the gathers, and the ranks agree on the outcome, so that either all of them go on or all of them raise.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatron_rest.config import WeightSyncConfig
from megatron_rest.weight_sync.digest import digest
from megatron_rest.weight_sync.gloo import GlooSender
from megatron_rest.weight_sync.source import MegatronWeightSource, TensorMeta

__all__ = ["TRANSPORTS", "SyncReport", "SyncTarget", "WeightSync", "WeightSyncError"]

_OK, _DIFFERENT, _BROKEN = 0, 1, 2  # outcomes of an attempt, worst wins over all ranks
_MAX_ATTEMPTS = 2  # one full resend


class WeightSyncError(RuntimeError):
    """The engine could not be given the policy's weights; it must not be sampled from."""


class SyncTarget(Protocol):
    """What an engine offers a transfer; vLLM's four weight-transfer calls and two checks."""

    policy_version: int

    @property
    def num_workers(self) -> int: ...

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self) -> None: ...

    def received_weights(self) -> list[dict[str, Any]]: ...

    def reset_prefix_cache(self) -> bool: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """One transfer in numbers."""

    version: int
    seconds: float  # the whole push
    gather_seconds: float  # of which: waiting for the source (collectives, reassembly)
    num_bytes: int  # of the full tensors handed to the engine, in the attempt that held
    num_tensors: int
    attempts: int  # 1, or 2 after a resend
    checksum: str  # over names and digests of all tensors; equal on all ranks, equal for equal weights
    drifted: tuple[str, ...] = ()  # replicated parameters whose copies were not bit-equal between TP ranks


class Transport(Protocol):
    """How a stream of tensors reaches an engine's workers."""

    def connect(self, engine: SyncTarget) -> None:
        """Once, before the first transfer."""
        ...

    def send(self, engine: SyncTarget, stream: Iterator[tuple[str, Tensor]], metadata: list[TensorMeta]) -> None:
        """Let the engine receive and load the whole stream, which is what ``metadata`` says."""
        ...


class LocalTransport:
    """The engine lives in this process: it pulls the tensors from the stream, by reference."""

    def connect(self, engine: SyncTarget) -> None:
        engine.init_weight_transfer({})

    def send(self, engine: SyncTarget, stream: Iterator[tuple[str, Tensor]], metadata: list[TensorMeta]) -> None:
        engine.update_weights({"weights": stream})


TRANSPORTS = ("local", "gloo")


class WeightSync:
    """Transfers a source's weights into engines.

    Transport ``local``: every rank has an engine in its own process and makes one of these with it.  Transport
    ``gloo``: one rank of TP x PP holds the engine's handle and sends; the others make theirs with ``engine=None`` and
    only take part in the gathers.

    Collectives: those of one or two passes over ``source``, and two all-reduces of one integer on each of its groups.
    Raises ValueError for an unknown transport.
    """

    def __init__(self, engine: SyncTarget | None, source: MegatronWeightSource, config: WeightSyncConfig) -> None:
        if config.transport not in TRANSPORTS:
            raise ValueError(f"weight_sync.transport {config.transport!r} is not known; expected one of {TRANSPORTS}")
        self._engine = engine
        self._source = source
        self._tamper: Callable[[str, Tensor], Tensor] | None = None  # fault injection: between digest and hand-over
        is_local = config.transport == "local"
        self._transport: Transport = LocalTransport() if is_local else GlooSender(bucket_bytes=config.bucket_bytes)
        if engine is not None:
            self._transport.connect(engine)

    def push(self, version: int) -> SyncReport:
        """Give the engines the source's present weights and prove that they got them.

        Returns when they hold them and have forgotten keys and values of older ones.  Raises WeightSyncError on every
        rank when a tensor differs after a resend (named on the rank that saw it), when an engine fails, or when a
        prefix cache cannot be reset; the engine then refuses to sample.
        """
        started = time.perf_counter()
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            sent = _Pass(self._source, self._tamper)
            wrong, error = self._attempt(sent)
            mine = _BROKEN if error else _DIFFERENT if wrong else _OK
            worst = self._source.worst_of_ranks(mine)
            if worst == _OK:
                break
            if worst == _BROKEN or attempt == _MAX_ATTEMPTS:
                raise WeightSyncError(_explain(version, attempt, wrong, error)) from error
        self._reset_prefix_cache(version)
        if self._engine is not None:
            self._engine.policy_version = version
        return SyncReport(
            version=version,
            seconds=time.perf_counter() - started,
            gather_seconds=sent.gather_seconds,
            num_bytes=sent.num_bytes,
            num_tensors=len(sent.digests),
            attempts=attempt,
            checksum=sent.checksum(),
            drifted=tuple(self._source.drifted),
        )

    def _attempt(self, sent: _Pass) -> tuple[list[str], Exception | None]:
        """Send everything once.  Returns the names that did not arrive as sent, and what broke, if anything did."""
        stream = iter(sent)
        error: Exception | None = None
        received: list[dict[str, Any]] = []
        try:
            if self._engine is not None:
                self._engine.start_weight_update()
                self._transport.send(self._engine, stream, self._source.metadata())
                self._engine.finish_weight_update()
                received = self._engine.received_weights()
        except Exception as e:  # noqa: BLE001  raised by push() after all ranks have agreed; alone it would strand them
            error = e
        for _ in stream:  # what the engine did not take: the gathers are collectives
            pass
        wrong = list(self._source.faults)
        for worker in received:
            got = {name: tuple(value) for name, value in worker["digests"].items()}  # an RPC makes lists of tuples
            wrong += [name for name, value in sent.digests.items() if got.get(name) != value]
            wrong += [f"{name} (engine parameter that nothing was sent for)" for name in worker["missing"]]
        return list(dict.fromkeys(wrong)), error

    def _reset_prefix_cache(self, version: int) -> None:
        done = self._engine is None or self._engine.reset_prefix_cache()
        if self._source.worst_of_ranks(_OK if done else _BROKEN) != _OK:
            where = "an engine of another rank" if done else "this engine"
            raise WeightSyncError(
                f"weights of version {version} arrived, but {where} kept its prefix cache, because requests are "
                "running: transfer between rollouts"
            )


class _Pass:
    """One pass over the source, with the digest of every tensor that leaves."""

    def __init__(self, source: MegatronWeightSource, tamper: Callable[[str, Tensor], Tensor] | None) -> None:
        self._source, self._tamper = source, tamper
        self.digests: dict[str, tuple[int, int]] = {}
        self.num_bytes = 0
        self.gather_seconds = 0.0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        tensors = iter(self._source)
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

    def checksum(self) -> str:
        return hashlib.blake2b(repr(list(self.digests.items())).encode(), digest_size=8).hexdigest()


def _explain(version: int, attempt: int, wrong: list[str], error: Exception | None) -> str:
    head = f"transfer of weights version {version} failed in attempt {attempt} of {_MAX_ATTEMPTS}"
    if error is not None:
        return f"{head}: the engine raised {type(error).__name__}: {error}; its model is half loaded, make a new engine"
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        return f"{head}: bytes received differ from bytes sent in {', '.join(wrong[:5])}{more}"
    return f"{head}: another rank reported a fault"
