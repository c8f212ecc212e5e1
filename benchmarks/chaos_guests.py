"""Environments that do what no environment should, for ``benchmarks.chaos``: ``benchmarks.chaos_guests:Guest``.

What a guest does depends on the prompt's row alone, so that two runs meet the same guests.  ``deadly`` ones may also
end the process that they are in, and leave a process of their own behind.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

from megatron_rest.rollout.environments.base import Answer, Message, Observation
from megatron_rest.types import PromptSample

__all__ = ["DEADLY", "FAULTS", "Guest"]

FAULTS = (
    "raises when it is made", "raises at reset", "raises", "raises SystemExit", "raises 10 MB", "returns None",
    "returns bytes", "returns half a character", "returns 10 MB", "returns a thousand messages", "returns NaN",
    "returns infinity", "returns an array", "returns what cannot be printed", "hangs", "raises at close",
)  # fmt: skip
"""The end of that rollout, and of nothing else; or (long and broken texts) nothing at all."""

DEADLY = ("dies", "leaves a process", "reads what is not for it", "closes what is not its own")

_STEP = {
    "returns None": None,
    "returns bytes": b"bytes",
    "returns half a character": Observation(messages=(Message(role="tool", content="\ud83d"),)),
    "returns 10 MB": Observation(messages=(Message(role="tool", content="x" * 10_000_000),)),
    "returns a thousand messages": Observation(messages=(Message(role="tool", content="x" * 70_000),) * 1000),
    "returns an array": np.zeros(3),
}
_REWARD = {
    "returns bytes": b"1.0",
    "returns 10 MB": "1" * 10_000_000,
    "returns NaN": math.nan,
    "returns infinity": math.inf,
    "returns an array": np.zeros(3),
}


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


class Guest:
    """One conversation.

    Args:
        prompt: its row says what this guest does: every second one behaves.
        deadly: whether it may be one of DEADLY.
    """

    def __init__(self, prompt: PromptSample, *, deadly: bool = False) -> None:
        kinds = FAULTS + (DEADLY if deadly else ())
        self.fault = kinds[prompt.index // 2 % len(kinds)] if prompt.index % 2 else ""
        self.words = 0
        self._at("raises when it is made")

    def reset(self) -> None:
        self._at("raises at reset")

    def step(self, answer: Answer) -> Any:
        self.words += len(answer.text.split())
        self._misbehave()
        if self.fault == "returns what cannot be printed":
            return _Unprintable()
        if self.fault in _STEP:
            return _STEP[self.fault]
        return Observation(messages=(Message(role="tool", content="go on"),))

    def reward(self) -> Any:
        self._misbehave()
        if self.fault == "returns what cannot be printed":
            return _Unprintable()
        return _REWARD.get(self.fault, 0.1 * self.words)

    def close(self) -> None:
        self._at("raises at close")

    def _at(self, fault: str) -> None:
        if self.fault == fault:
            raise OSError(f"a guest that {fault}")

    def _misbehave(self) -> None:
        match self.fault:
            case "raises":
                raise ValueError(_Unprintable())
            case "raises SystemExit":
                sys.exit("a guest that ends")
            case "raises 10 MB":
                raise ValueError("x" * 10_000_000)
            case "hangs":
                time.sleep(3600)
            case "dies":
                os._exit(9)
            case "leaves a process":
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
                os._exit(9)
            case "reads what is not for it":
                os.read(0, 1 << 16)
            case "closes what is not its own":
                os.close(1)
