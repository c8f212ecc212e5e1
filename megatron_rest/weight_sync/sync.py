"""One verified transfer of the policy into an engine.

    push(version):  start -> stream tensors, a digest of each at the source -> finish -> fetch the receiver's digests
                    all ranks agree: equal -> prefix cache reset -> the engine holds ``version``
                                     different -> everything is sent once more; different again -> WeightSyncError

Every rank of TP x PP calls :meth:`WeightSync.push` together, whatever happens on it: a rank whose engine fails still
takes part in the gathers, and the ranks agree on the outcome, so that either all of them go on or all of them raise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rest.config import WeightSyncConfig
from megatron_rest.weight_sync.sliced import SliceTransport
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weight_sync.stream import StreamTransport
from megatron_rest.weight_sync.transport import Outcome, SyncTarget, Tamper, Transport

__all__ = ["SyncReport", "SyncTarget", "WeightSync", "WeightSyncError", "make_transport"]

_log = logging.getLogger(__name__)
_OK, _DIFFERENT, _BROKEN = 0, 1, 2  # outcomes of an attempt, worst wins over all ranks
_MAX_ATTEMPTS = 2  # one full resend


class WeightSyncError(RuntimeError):
    """The engine could not be given the policy's weights; it must not be sampled from.

    Attributes:
        engines: whose link to this rank broke, by their position among those that take part.
    """

    def __init__(self, message: str, engines: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.engines = tuple(engines)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """One transfer in numbers."""

    version: int
    seconds: float  # the whole push
    gather_seconds: float  # of which: waiting for the source (collectives, reassembly); 0 where slices are sent
    transfer_seconds: float  # of which: from the first byte sent to the last one loaded; 0 on ranks without an engine
    num_bytes: int  # whole tensors: handed to this rank's engine; slices: received by all workers of all engines
    num_tensors: int
    attempts: int  # 1, or 2 after a resend
    checksum: str  # over names and digests of all tensors; equal on all ranks, equal for equal weights
    drifted: tuple[str, ...] = ()  # replicated parameters whose copies were not bit-equal between TP ranks


def make_transport(source: MegatronWeightSource, config: WeightSyncConfig) -> Transport:
    """The way that ``weight_sync.transport`` names."""
    match config.transport:
        case "local":
            return StreamTransport(source)
        case "gloo":
            return SliceTransport(source, message_bytes=config.bucket_bytes, backend="gloo")
        case "nccl":
            return SliceTransport(source, message_bytes=config.bucket_bytes, backend="nccl")
    raise AssertionError(config.transport)  # WeightSyncConfig refuses every other name


class WeightSync:
    """Transfers a source's weights into engines.

    Every rank of the source makes one, with the engine that it owns or ``None``.  Transport ``local``: an engine in
    every rank's process.  The others: engines in processes of their own, owned by any of the ranks; each worker
    gets its slices from all ranks.

    Collectives: those of connecting and of one or two attempts of the transport, and two all-reduces of one integer on
    each group of the source.  Raises ConnectionError when an engine cannot be asked or reached,
    ValueError when its layout or quantisation does not fit.
    """

    def __init__(self, engine: SyncTarget | None, source: MegatronWeightSource, config: WeightSyncConfig) -> None:
        self._engine = engine
        self._source = source
        self._tamper: Tamper | None = None  # fault injection: between digest and hand-over
        self._transport = make_transport(source, config)
        self._transport.connect(engine)

    @property
    def transport(self) -> Transport:
        """What carries the weights; a :class:`SliceTransport` has its plans."""
        return self._transport

    def push(self, version: int) -> SyncReport:
        """Give the engines the source's present weights and prove that they got them.

        Returns when they hold them and have forgotten keys and values of older ones.  Raises WeightSyncError on every
        rank when a tensor differs after a resend (named where it was seen; by slices on every rank), when an engine
        fails, or when a prefix cache cannot be reset; the engine then refuses to sample.  Also when a matrix that is to
        be quantised is not finite; by slices nothing has left then, and the engines keep what they had.
        """
        started = time.perf_counter()
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            outcome = self._transport.attempt(self._engine, detailed=attempt > 1, tamper=self._tamper)
            mine = _BROKEN if outcome.is_broken else _DIFFERENT if outcome.wrong else _OK
            worst = self._source.worst_of_ranks(mine)
            if worst == _OK:
                break
            if worst == _BROKEN or attempt == _MAX_ATTEMPTS:
                raise WeightSyncError(_explain(version, attempt, outcome), tuple(outcome.lost_peers)) from outcome.error
            if outcome.wrong:
                _log.warning("weights of version %d are sent again: %s", version, _explain(version, attempt, outcome))
        self._reset_prefix_cache(version)
        if self._engine is not None:
            self._engine.policy_version = version
        return SyncReport(
            version=version,
            seconds=time.perf_counter() - started,
            gather_seconds=outcome.gather_seconds,
            transfer_seconds=outcome.transfer_seconds,
            num_bytes=outcome.num_bytes,
            num_tensors=outcome.num_tensors,
            attempts=attempt,
            checksum=outcome.checksum,
            drifted=tuple(self._source.drifted),
        )

    def close(self) -> None:
        """Give up the connections; a new one is made for other engines.  Not collective."""
        self._transport.close()

    def _reset_prefix_cache(self, version: int) -> None:
        done = self._engine is None or self._engine.reset_prefix_cache()
        if self._source.worst_of_ranks(_OK if done else _BROKEN) != _OK:
            where = "an engine of another rank" if done else "this engine"
            raise WeightSyncError(
                f"weights of version {version} arrived, but {where} kept its prefix cache, because requests are "
                "running: transfer between rollouts"
            )


def _explain(version: int, attempt: int, outcome: Outcome) -> str:
    head = f"transfer of weights version {version} failed in attempt {attempt} of {_MAX_ATTEMPTS}"
    if names := outcome.non_finite:
        return f"{head}: {_listed(names)} of the policy cannot be quantised: NaN or infinity, training has diverged"
    if (error := outcome.error) is not None:
        return f"{head}: the engine raised {type(error).__name__}: {error}; its model is half loaded, make a new engine"
    if outcome.wrong:
        return f"{head}: bytes received differ from bytes sent in {_listed(outcome.wrong)}"
    return f"{head}: {'; '.join(outcome.lost_peers.values()) or 'another rank reported a fault'}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
