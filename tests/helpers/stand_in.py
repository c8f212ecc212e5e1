"""An engine process that is none, for tests and measurements of what lies around engines: fleet, deal, exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_rest.config import RolloutConfig
from megatron_rest.rollout.engine import NO_WEIGHTS
from megatron_rest.rollout.remote import RemoteEngine
from megatron_rest.trainer.fleet import EngineFleet, Placement

__all__ = ["StandInEngine", "fleet_of", "give_weights"]


class StandInEngine(RemoteEngine):
    """Lives while ``alive``; what it samples, and how long it starts, its subclasses say (``run``, ``wait_ready``)."""

    def __init__(self) -> None:
        self.alive, self.num_restarts, self.policy_version = True, 0, NO_WEIGHTS

    @property
    def is_alive(self) -> bool:
        return self.alive

    @property
    def is_ready(self) -> bool:
        return self.alive

    @property
    def machine(self) -> str:
        return "here"

    def restart(self) -> None:
        self.alive, self.num_restarts, self.policy_version = True, self.num_restarts + 1, NO_WEIGHTS

    def wake_up(self) -> None: ...

    def sleep(self) -> None: ...


def fleet_of(
    engine: StandInEngine, connect: Callable[[bool], Any], *, rank: int, ranks: int, **settings: Any
) -> EngineFleet:
    """Of an engine in every rank; ``settings`` are those of :class:`RolloutConfig`."""
    config = RolloutConfig(replicas=ranks, **settings)
    placement = Placement(tuple((i,) for i in range(ranks)))
    return EngineFleet(engine, placement=placement, rank=rank, config=config, connect=connect)


def give_weights(fleet: EngineFleet, version: int) -> None:
    """As the trainer does, with a canary that has nothing to say."""
    fleet.deliver(version, lambda singers: 0.0)
    fleet.admit(version)
