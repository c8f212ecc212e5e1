"""What a multi-turn environment is: one conversation with tools or a user behind it.

    environment = factory(prompt)                      one instance a rollout, never used for a second one
    environment.reset()                                once, before the first answer
    observation = environment.step(answer)             after every answer of the policy, until observation.done
    environment.reward()                               once, when the rollout is over; None: judged from the text
    environment.close()                                always

Every call runs beside the engine with a time limit; one that takes longer is abandoned (its result is dropped), which
ends the rollout.  An error that a tool should tell the policy about is a message; an exception ends the rollout.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_rest.rollout.environments.calls import ParsedCalls
from megatron_rest.types import PromptSample

__all__ = ["Answer", "Environment", "EnvironmentFactory", "Message", "Observation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of the conversation that the policy has not written itself."""

    role: str  # "tool" or "user", as the chat template knows them
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One turn of the policy."""

    text: str  # without the end-of-turn marker
    calls: ParsedCalls
    turn: int  # 0 for the first


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What the policy sees next.  With ``done`` nothing is appended and the rollout ends."""

    messages: tuple[Message, ...] = ()
    done: bool = False

    def __post_init__(self) -> None:
        if bool(self.messages) == self.done:
            raise ValueError("an observation holds messages for the policy, or it ends the rollout (done=True)")


class Environment(Protocol):
    """One conversation; single use.  Any method may be ``async``."""

    def reset(self) -> Awaitable[None] | None: ...

    def step(self, answer: Answer) -> Observation | Awaitable[Observation]: ...

    def reward(self) -> float | Awaitable[float | None] | None: ...

    def close(self) -> Awaitable[None] | None: ...


EnvironmentFactory = Callable[[PromptSample], Environment]
