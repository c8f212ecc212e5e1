"""Rewards that a configuration names, over all rollouts of a step.

A function or server of somebody else's may say another thing at every call, so each rollout is asked about once: by the
rank whose turn it is.  What was said travels as JSON to all ranks, which therefore agree.  What failed is no reward:
such a rollout carries no loss, and no sibling is compared with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from megatron_rest.config import RewardConfig, RewardTerm
from megatron_rest.errors import RunError, described
from megatron_rest.rewards.functions import Reward, RewardInput, checked_reward
from megatron_rest.rewards.server import RewardServer
from megatron_rest.rewards.workers import RewardWorkers
from megatron_rest.trainer.reading import all_gather_bytes
from megatron_rest.trainer.time_limit import time_limit
from megatron_rest.types import TokenRegion
from megatron_rest.user_code import NamedCode, load_named

__all__ = ["RewardTerms", "all_gather_json", "token_rewards"]

_log = logging.getLogger(__name__)
_SHOWN = 300  # characters of a failure


class _Caller(Protocol):
    def __call__(self, answers: Sequence[RewardInput]) -> list[Any]: ...

    def close(self) -> None: ...


class RewardTerms:
    """The foreign terms of ``reward.*`` (:attr:`RewardTerm.is_foreign`).

    Args:
        config: names the terms.

    Raises ConfigError if a function cannot be imported or called as it will be.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.terms = tuple(term for term in config.as_terms() if term.is_foreign)
        self._callers = [_caller(term, config) for term in self.terms]
        self._warned: set[str] = set()

    def __call__(self, count: int, answer: Callable[[int], RewardInput]) -> list[list[Reward | str]]:
        """Of each of ``count`` answers what every term said, or why it said nothing; the same on every rank.

        ``answer`` makes those that this rank asks about.

        Collectives (where there are several ranks): two all-gathers over all of them, sizes and JSON.
        Raises RunError if a term said nothing of any answer: that is no accident.
        """
        if not self.terms:
            return [[] for _ in range(count)]
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = [answer(i) for i in range(count)[rank::world]]
        said = [self._ask(number, mine) for number in range(len(self.terms))]
        table: list[list[Reward | str]] = [[] for _ in range(count)]
        for other, columns in enumerate(all_gather_json(said)):
            for column in columns:
                for row, value in zip(table[other::world], column, strict=True):
                    row.append(value["failed"] if "failed" in value else _reward(value))
        self._look_at(table)
        return table

    def close(self) -> None:
        """End the processes that were started."""
        for caller in self._callers:
            caller.close()

    def _ask(self, number: int, answers: Sequence[RewardInput]) -> list[dict[str, Any]]:
        values = []
        for answer, said in zip(answers, self._callers[number](answers), strict=True):
            if not isinstance(said, Exception):
                try:
                    values.append(checked_reward(said, answer).to_json())
                    continue
                except (TypeError, ValueError) as error:
                    said = error
            values.append({"failed": described(said)[:_SHOWN]})
        return values

    def _look_at(self, table: Sequence[Sequence[Reward | str]]) -> None:
        for number, term in enumerate(self.terms):
            failures = [row[number] for row in table if isinstance(row[number], str)]
            if failures and len(failures) == len(table):
                raise RunError(f"{term.key} {term.function} judged none of {len(table)} rollouts: {failures[0]}")
            if failures and term.name not in self._warned:
                self._warned.add(term.name)
                _log.warning(
                    "%s %s failed on %d of %d rollouts, which carry no loss (reward/failed counts them; said once): %s",
                    term.key, term.function, len(failures), len(table), failures[0],
                )  # fmt: skip


def _caller(term: RewardTerm, config: RewardConfig) -> _Caller:
    if "://" in term.code:
        return RewardServer(
            term.code,
            arguments=term.arguments,
            batch_size=config.batch_size,
            timeout_seconds=config.call_timeout_seconds,
            retries=config.retries,
        )
    named = NamedCode(key=term.key, reference=term.code, called_with=("answer",), arguments=term.arguments)
    function = load_named(named)  # here as well, so that a function that is none ends the start
    if config.workers:
        return RewardWorkers(named, num_workers=config.workers, timeout_seconds=config.call_timeout_seconds)
    return _Here(function, term, config.call_timeout_seconds)


class _Here:
    """In this process."""

    def __init__(self, function: Callable[..., Any], term: RewardTerm, timeout_seconds: float) -> None:
        self._function, self._term, self._timeout = function, term, timeout_seconds

    def __call__(self, answers: Sequence[RewardInput]) -> list[Any]:
        return [self._one(answer) for answer in answers]

    def close(self) -> None:
        """Nothing is open."""

    def _one(self, answer: RewardInput) -> Any:
        try:
            what = f"{self._term.function} on prompt {answer.prompt_id}"
            with time_limit(self._timeout, what, key="reward.call_timeout_seconds"):
                return self._function(answer, **self._term.arguments)
        except Exception as error:  # noqa: BLE001  foreign code: its failure ends one rollout
            return error
        except SystemExit as error:
            return RuntimeError(described(error))


def _reward(values: dict[str, Any]) -> Reward:
    tuples = {name: tuple(values[name]) for name in ("turns", "calls", "tokens", "findings")}
    return Reward(**{**values, **tuples})


def all_gather_json(value: Any) -> list[Any]:
    """Every rank's value, in rank order, as JSON: nothing is pickled.  Collectives: two all-gathers over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in all_gather_bytes(mine)]


def token_rewards(reward: Reward, loss_mask: np.ndarray, regions: np.ndarray, num_calls: Sequence[int]) -> np.ndarray:
    """float64 [R]: a reward's fine parts on tokens of the response; NaN where nothing was said.

    Args:
        reward: as its function said it.
        loss_mask: bool [R], the policy's own tokens.
        regions: int8 [R].
        num_calls: calls of every turn, as they were read.

    A turn's is on its last token, a call's on the last token of its name or arguments (on the turn's last one where
    regions and reading disagree about how many there are), a token's on itself.
    """
    earned, is_said = np.zeros(len(loss_mask)), np.zeros(len(loss_mask), bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loss_mask, [False]]).astype(np.int8)))
    turns = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    for value, (_, end) in zip(reward.turns, turns, strict=False):
        earned[end - 1] += value
        is_said[end - 1] = True
    calls = iter(reward.calls)
    for (start, end), count in zip(turns, num_calls, strict=True):
        ends = _call_ends(regions[start:end])
        for number in range(count if reward.calls else 0):
            at = start + ends[number] if len(ends) == count else end - 1
            earned[at] += next(calls)
            is_said[at] = True
    if reward.tokens:
        earned[loss_mask] += np.asarray(reward.tokens)
        is_said |= loss_mask
    return np.where(is_said, earned, np.nan)


def _call_ends(regions: np.ndarray) -> list[int]:
    """Index of the last name or argument token of each call of a turn; a call begins where names begin."""
    is_name = regions == TokenRegion.TOOL_NAME
    starts = np.flatnonzero(is_name & ~np.concatenate([[False], is_name[:-1]])).tolist()
    inside = is_name | (regions == TokenRegion.TOOL_ARGS)
    return [
        begin + int(np.flatnonzero(inside[begin:stop])[-1])
        for begin, stop in zip(starts, [*starts, len(regions)][1:], strict=True)
    ]
