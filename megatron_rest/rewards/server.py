"""Rewards from behind an address: batches of answers by HTTP, sent again when a request fails.

POST  {"answers": [RewardInput as JSON, ...], "arguments": {...}}
200   {"rewards": [number | Reward as JSON | {"error": "why not"}, ...]}      one for each answer, in order
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_rest.rewards.functions import RewardInput

__all__ = ["RewardServer"]

_LARGEST_REPLY = 1 << 28
_AT_ONCE = 8  # requests of one rank
_FIRST_PAUSE = 0.5  # seconds; doubled from try to try


class RewardServer:
    """One address.

    Args:
        url: where to POST.
        arguments: sent along with every request.
        batch_size: answers of a request.
        timeout_seconds: for one request.
        retries: times that a failed one is sent again.
    """

    def __init__(
        self, url: str, *, arguments: Mapping[str, Any], batch_size: int, timeout_seconds: float, retries: int
    ) -> None:
        self._url = url
        self._arguments = dict(arguments)
        self._batch_size = batch_size
        self._timeout = timeout_seconds
        self._retries = retries

    def __call__(self, answers: Sequence[RewardInput]) -> list[Any]:
        """What the server said of each; an exception where it said nothing."""
        starts = range(0, len(answers), self._batch_size)
        batches = [answers[start : start + self._batch_size] for start in starts]
        if not batches:
            return []
        with ThreadPoolExecutor(min(_AT_ONCE, len(batches))) as pool:
            return [one for part in pool.map(self._ask, batches) for one in part]

    def close(self) -> None:
        """Nothing is open."""

    def _ask(self, batch: Sequence[RewardInput]) -> list[Any]:
        values = {"answers": [answer.to_json() for answer in batch], "arguments": self._arguments}
        body = json.dumps(values).encode()
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                return self._send(body, len(batch))
            except urllib.error.HTTPError as error:
                failure: Exception = ConnectionError(f"{self._url} answered {error.code} {error.reason}")
                if 400 <= error.code < 500 and error.code not in (408, 425, 429):
                    break  # the same request will be refused again
            except (OSError, ValueError) as error:
                failure = ConnectionError(f"{self._url}: {getattr(error, 'reason', error)}")
        return [failure] * len(batch)

    def _send(self, body: bytes, count: int) -> list[Any]:
        request = urllib.request.Request(self._url, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self._timeout) as response:
            text = response.read(_LARGEST_REPLY + 1)
        if len(text) > _LARGEST_REPLY:
            raise ValueError("it answered with more than 256 MB")
        reply = json.loads(text)
        rewards = reply.get("rewards") if isinstance(reply, dict) else None
        if not isinstance(rewards, list) or len(rewards) != count:
            raise ValueError(f"it should answer with {count} rewards, and answered {text[:80]!r}")
        return [_said(one) for one in rewards]


def _said(one: Any) -> Any:
    if isinstance(one, dict) and "error" in one:
        return RuntimeError(str(one["error"])[:500])
    return one
