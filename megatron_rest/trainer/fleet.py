"""The engines of all ranks as one: who samples what, weights into all of them, and what happens when one goes.

    begin(prompts, seed)      every engine's owner takes its share (in a thread where training goes on beside it)
    collect(refresh)          wait; engines lost on the way are replaced, given the present weights, and sample what is
                              missing, with the same seeds; all groups on all ranks
    examine(prompts, exam)    the same with one greedy answer a prompt, while no rollouts are under way
    deliver(version, canary)  weights into every engine, verified; engines lost on the way are replaced and all is sent
                              again

Every public method that says so is collective: the ranks agree after each attempt, so they all go on, or all raise.
A rollout is kept under its key as soon as it is complete: what a lost engine had handed over is not sampled again, what
it had not is sampled by its successor, and nothing is counted twice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_rest.config import ConfigError, RolloutConfig
from megatron_rest.mcore.build import ParallelContext
from megatron_rest.rollout.engine import (
    NO_WEIGHTS,
    EngineLostError,
    Exam,
    RolloutEngine,
    RolloutRequest,
    as_groups,
    make_requests,
)
from megatron_rest.rollout.remote import RemoteEngine
from megatron_rest.trainer.exchange import all_gather_groups
from megatron_rest.types import PromptSample, Rollout, RolloutGroup
from megatron_rest.weight_sync.sync import SyncReport, WeightSync, WeightSyncError

__all__ = ["EngineFleet", "Placement", "engine_devices"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which ranks have which engine; engine ``i`` of ``n`` rolls out prompts ``i, i + n, i + 2 n, ...``"""

    members: tuple[tuple[int, ...], ...]  # ranks of each engine: its owner, or all that hold a part of it; rank 0 first

    @property
    def owners(self) -> tuple[int, ...]:
        """The rank of each engine that hands its rollouts over."""
        return tuple(ranks[0] for ranks in self.members)

    @classmethod
    def of(cls, config: RolloutConfig, world_size: int) -> Placement:
        """Colocated (``rollout.replicas`` 0): an engine in every rank, or over every ``tensor_parallel`` ranks in a
        row, which lie in one node as those of Megatron's TP groups do.  Else replicas spread evenly over the ranks, so
        over nodes.
        """
        if config.replicas:
            return cls(tuple((i * world_size // config.replicas,) for i in range(config.replicas)))
        size = config.tensor_parallel
        return cls(tuple(tuple(range(first, first + size)) for first in range(0, world_size, size)))

    def engine_of(self, rank: int) -> int | None:
        """Index of the engine that ``rank`` has, or has a part of."""
        return next((i for i, ranks in enumerate(self.members) if rank in ranks), None)


def engine_devices(context: ParallelContext, config: RolloutConfig, placement: Placement, index: int) -> str | None:
    """GPUs of engine ``index``, by their numbers among those that its owner sees: behind those of the ranks there.

    None on CPU.  Raises ConfigError when the node has too few.
    """
    if context.device.type == "cpu":
        return None
    node = context.rank // context.ranks_per_node
    before = sum(owner // context.ranks_per_node == node for owner in placement.owners[:index])
    first = context.ranks_per_node + before * config.tensor_parallel
    last = first + config.tensor_parallel
    if last > torch.cuda.device_count():
        raise ConfigError(
            f"rollout.replicas {config.replicas} x rollout.tensor_parallel {config.tensor_parallel}: engine {index} "
            f"would take GPUs {first} to {last - 1}, and its node has {torch.cuda.device_count()} of which the ranks "
            f"use {context.ranks_per_node}: start fewer ranks a node or use fewer replicas"
        )
    return ",".join(str(i) for i in range(first, last))


class EngineFleet:
    """This rank's engine, if it has one, and the agreement with the other ranks.

    Args:
        engine: None on ranks without one.
        placement: the same on every rank.
        rank: this rank.
        config: group size, limits.
        connect: makes the transfer to ``engine``; called on every rank together, again after engines were replaced.
    """

    def __init__(
        self,
        engine: RolloutEngine | None,
        *,
        placement: Placement,
        rank: int,
        config: RolloutConfig,
        connect: Callable[[], WeightSync],
    ) -> None:
        self.engine = engine
        self.placement = placement
        self.version = NO_WEIGHTS
        """Policy version that all engines hold."""
        self.num_restarts = 0
        """Engines started again so far, of all ranks."""
        self._index = placement.engine_of(rank)
        self._hands_over = rank in placement.owners
        self._config = config
        self._connect = connect
        self._sync: WeightSync | None = None
        self._share: _Share | None = None
        self._prompts: Sequence[PromptSample] = ()

    @property
    def has_first_engine(self) -> bool:
        """Whether this rank has the first engine, or a part of it."""
        return self._index == 0

    @property
    def is_begun(self) -> bool:
        """Whether rollouts are under way or waiting to be collected."""
        return self._share is not None

    def begin(self, prompts: Sequence[PromptSample], *, seed: int, in_background: bool) -> None:
        """Start this rank's share of the rollouts; with ``in_background`` it runs while the caller goes on."""
        self._prompts = prompts
        self._share = _Share(
            self.engine,
            self._requests(prompts, self._config.rollouts_per_prompt, seed),
            group_size=self._config.rollouts_per_prompt,
            max_response_tokens=self._config.max_response_tokens,
        )
        self._share.start(in_background)

    def examine(
        self, prompts: Sequence[PromptSample], exam: Exam, *, max_response_tokens: int, refresh: Callable[[], object]
    ) -> list[RolloutGroup]:
        """One greedy answer to every prompt, in their order, on every rank.  Collective; as :meth:`collect`.

        The engines hold the present weights, and no rollouts are under way.
        """
        assert not self.is_begun, "the engines are busy with rollouts"
        self._prompts = prompts
        self._share = _Share(
            self.engine,
            self._requests(prompts, 1, 0),
            group_size=1,
            max_response_tokens=max_response_tokens,
            exam=exam,
        )
        self._share.start(in_background=False)
        return self.collect(refresh)

    def _requests(self, prompts: Sequence[PromptSample], group_size: int, seed: int) -> list[RolloutRequest]:
        """Those of this rank's engine."""
        requests = make_requests(prompts, rollouts_per_prompt=group_size, seed=seed)
        num_engines = len(self.placement.owners)
        return [r for r in requests if (r.key // group_size) % num_engines == self._index]

    def collect(self, refresh: Callable[[], object]) -> list[RolloutGroup]:
        """All groups of the step, in the order of its prompts, on every rank.  Collective.

        ``refresh`` gives every engine the present weights (:meth:`deliver`); it is called when engines were lost.
        Raises EngineLostError on every rank after ``rollout.max_restarts`` losses in a row.
        """
        assert self._share is not None, "begin() comes first"
        share = self._share
        for attempt in range(self._config.max_restarts + 1):
            lost = share.wait()
            num_lost = _sum_over_ranks(lost is not None)
            if not num_lost:
                break
            self._check_attempts(attempt, "sampling", lost)
            self._restart(lost, num_lost)
            refresh()
            if share.missing:
                _log.warning("%d of %d rollouts are sampled again", len(share.missing), len(share.requests))
            share.start(in_background=False)
        self._share = None
        mine: list[RolloutGroup] = []
        if self._hands_over:
            mine = as_groups(share.requests, share.done, share.group_size)
        return all_gather_groups(mine, self._prompts, owners=self.placement.owners)

    def deliver(self, version: int, canary: Callable[[], float | None]) -> tuple[SyncReport, float]:
        """Weights of ``version`` into every engine, then the canary; what the transfer says, and the canary's gap.

        Collective; ``canary`` is, too, and returns None on every rank when an engine was lost under it.  Raises
        WeightSyncError on every rank when a transfer fails otherwise than by a lost engine, and after
        ``rollout.max_restarts`` losses in a row.
        """
        if self.engine is not None:
            self.engine.wake_up()
        self.version = NO_WEIGHTS
        for attempt in range(self._config.max_restarts + 1):
            report, error = self._push(version)
            lost = error if self._is_lost(error) else None
            num_failed, num_lost = _sum_over_ranks(error is not None), _sum_over_ranks(lost is not None)
            if not num_failed:
                worst = canary()
                if worst is not None:
                    assert report is not None
                    self.version = version
                    return report, worst
                lost = self._silent()
                num_lost = _sum_over_ranks(lost is not None)
            elif not num_lost:
                raise error or WeightSyncError("the transfer failed in another data-parallel replica")
            self._check_attempts(attempt, f"taking weights of version {version}", lost)
            self._restart(lost, num_lost)
        raise AssertionError("the last attempt returns or raises")

    def engine_arguments(self) -> dict[str, Any]:
        """What this rank's engine was made with; empty without one, or if it is lost just now."""
        try:
            return {} if self.engine is None else self.engine.arguments()
        except EngineLostError:
            return {}

    def sleep(self) -> None:
        """Engines give their GPU memory back until the next :meth:`deliver`."""
        if self.engine is not None:
            self.engine.sleep()

    def close(self) -> None:
        """End this rank's engine."""
        if self.engine is not None:
            self.engine.close()

    def _push(self, version: int) -> tuple[SyncReport | None, Exception | None]:
        """Connect if need be and push.  A rank that could not connect lets the others know before they would wait."""
        if self._sync is None:
            sync, error = None, None
            try:
                sync = self._connect()
            except Exception as failure:  # noqa: BLE001  raised by deliver() after all ranks have agreed
                error = failure
            if _sum_over_ranks(error is not None):
                return None, error or WeightSyncError("another rank could not connect to its engine")
            self._sync = sync
        assert self._sync is not None
        try:
            return self._sync.push(version), None
        except WeightSyncError as error:
            return None, error

    def _is_lost(self, error: Exception | None) -> bool:
        """Whether this rank's engine must be replaced: its process is gone, or it broke while loading."""
        if not isinstance(self.engine, RemoteEngine):
            return False
        return not self.engine.is_alive or (isinstance(error, WeightSyncError) and error.__cause__ is not None)

    def _silent(self) -> Exception | None:
        if self._is_lost(None):
            return EngineLostError("this rank's engine was lost under the canary")
        return None

    def _check_attempts(self, attempt: int, what: str, lost: Exception | None) -> None:
        if attempt == self._config.max_restarts:
            raise EngineLostError(
                f"engines were lost {attempt + 1} times in a row while {what} (rollout.max_restarts "
                f"{self._config.max_restarts}); last here: {lost or 'another rank lost its engine'}"
            ) from lost

    def _restart(self, lost: Exception | None, num_lost: int) -> None:
        """A new process in the place of this rank's lost one; every rank connects again at the next transfer."""
        self.num_restarts += num_lost
        self._sync = None
        if lost is not None:
            assert isinstance(self.engine, RemoteEngine)
            _log.warning("%s; a new one is started", lost)
            self.engine.restart()


class _Share:
    """This rank's rollouts of one step: what was asked for and what is there."""

    def __init__(
        self,
        engine: RolloutEngine | None,
        requests: list[RolloutRequest],
        *,
        group_size: int,
        max_response_tokens: int,
        exam: Exam | None = None,
    ) -> None:
        self.requests = requests
        self.group_size = group_size
        self.done: dict[int, Rollout] = {}
        self._engine = engine
        self._max_response_tokens = max_response_tokens
        self._exam = exam
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def missing(self) -> list[RolloutRequest]:
        return [request for request in self.requests if request.key not in self.done]

    def start(self, in_background: bool) -> None:
        """Sample what is missing."""
        self._thread, self._error = None, None
        if in_background:
            self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
            self._thread.start()

    def wait(self) -> EngineLostError | None:
        """Returns when all is there, or with what happened to the engine.  Other errors are raised."""
        if self._thread is None:
            self._run()
        else:
            self._thread.join()
        if self._error is None or isinstance(self._error, EngineLostError):
            return self._error
        raise self._error

    def _run(self) -> None:
        missing = self.missing
        if self._engine is None or not missing:
            return
        try:
            self._engine.run(
                missing,
                max_response_tokens=self._max_response_tokens,
                on_rollout=self.done.__setitem__,
                exam=self._exam,
            )
        except Exception as error:  # noqa: BLE001  carried to the thread that waits
            self._error = error


def _sum_over_ranks(value: bool) -> int:
    """How many ranks say yes; one all-reduce of an integer over all ranks."""
    total = torch.tensor([int(value)], dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)
