"""A conversation with the tools of the row itself: calls that their schemas forbid are sent back."""

from __future__ import annotations

from typing import Any

from megatron_rest.regions import schemas_of
from megatron_rest.rollout.environments.base import Answer, Message, Observation
from megatron_rest.types import PromptSample


class Workshop:
    """Single use: one instance a rollout.  The reward is the share of calls that fitted, 0 without any."""

    def __init__(self, prompt: PromptSample, *, tries: int = 2) -> None:
        self._schemas = schemas_of(prompt.tools)  # the row brings them
        self._is_strict = bool(prompt.metadata.get("strict", True))  # and whatever else it has
        self._tries = tries
        self._fitted: list[bool] = []

    def reset(self) -> None:
        """Nothing to prepare."""

    def step(self, answer: Answer) -> Observation:
        if not answer.calls.calls or answer.turn + 1 >= self._tries:
            self._fitted += [not self._why_not(call.name, call.arguments) for call in answer.calls.calls]
            return Observation(done=True)
        found = [(call.name, self._why_not(call.name, call.arguments)) for call in answer.calls.calls]
        self._fitted += [not why for _, why in found]
        return Observation(
            messages=tuple(Message(role="tool", content=f"{name}: {why or 'done'}") for name, why in found)
        )

    def reward(self) -> float:
        return sum(self._fitted) / len(self._fitted) if self._fitted else 0.0

    def close(self) -> None:
        """Nothing is open."""

    def _why_not(self, name: str, arguments: dict[str, Any]) -> str:
        if name not in self._schemas:
            return "there is no such tool"
        unknown = [key for key in arguments if key not in self._schemas[name]]
        return f"it has no parameter {unknown[0]}" if unknown and self._is_strict else ""
