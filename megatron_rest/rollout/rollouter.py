"""Requests -> rollouts: one engine loop over episodes that are in different turns.

    submit every prompt (more of them may come while the loop runs)
    while something runs:   step the engine -> ended turns -> (environment, in a thread of its own) -> next turn or done

Token in, token out: an episode's ids are the sampled ones as they came; tool outputs are rendered by the chat template,
tokenised once, and appended with ``loss_mask`` False.  The next turn's prompt is everything so far, so the engine's
prefix cache holds all but the new tokens.  Without an environment an episode is one turn.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_rest.errors import described
from megatron_rest.regions import Schemas, schemas_of
from megatron_rest.rollout.engine import Cut, MoreRequests, OnRollout, RolloutRequest, part_seed, turn_seed
from megatron_rest.rollout.environments.base import Answer, EnvironmentFactory, Message
from megatron_rest.rollout.environments.calls import ParsedCalls
from megatron_rest.rollout.environments.guest import Guest
from megatron_rest.types import Rollout, StopReason

__all__ = ["Conversation", "Sampler", "Turn", "run_rollouts"]

_WAIT_SECONDS = 0.05  # for an environment or more requests, while the engine has nothing to do
_NOT_JUDGED = 0.0  # reward of a rollout whose environment failed or hung; it carries no loss (trainer/judge.py)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as the engine ended it."""

    key: int
    token_ids: np.ndarray  # int32 [n], the stop token included
    log_probs: np.ndarray  # float32 [n]
    finish: str  # "stop": a stop token; "length": the limit it was given; "abort"; "cut": see Sampler.cut


class Sampler(Protocol):
    """An engine with continuous batching."""

    policy_version: int

    def submit(self, key: int, token_ids: Sequence[int], *, seed: int, max_tokens: int) -> None: ...

    def step(self) -> list[Turn]:
        """One iteration over everything that runs; the turns that ended in it."""
        ...

    def cut(self) -> list[Turn]:
        """End everything that runs; what has tokens already, as far as it came."""
        ...

    def room(self, num_tokens: int) -> int:
        """Tokens that the context takes behind ``num_tokens``."""
        ...


class Translator(Protocol):
    """Between token ids and what an environment reads and writes."""

    def text(self, token_ids: np.ndarray) -> str:
        """An answer without its end-of-turn marker."""
        ...

    def calls(self, text: str, schemas: Schemas) -> ParsedCalls:
        """Calls of an answer; ``schemas`` of the prompt's tools say what values without a written type are."""
        ...

    def render(self, messages: Sequence[Message]) -> np.ndarray:
        """int32: the messages and the next generation prompt, as tokens behind an ended turn."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What multi-turn rollouts need besides an engine."""

    factory: EnvironmentFactory
    translator: Translator
    max_turns: int
    timeout_seconds: float  # of one call to an environment
    close: Callable[[], object] = lambda: None  # ends what the factory has started


@dataclass(slots=True)
class _Episode:
    request: RolloutRequest
    prompt_ids: list[int]
    ids: list[np.ndarray] = field(default_factory=list)
    log_probs: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    versions: list[np.ndarray] = field(default_factory=list)
    num_tokens: int = 0  # of the response
    turn: int = 0
    guest: Guest | None = None  # its environment
    schemas: Schemas = field(default_factory=dict)  # of the prompt's tools

    @classmethod
    def of(cls, request: RolloutRequest, conversation: Conversation | None) -> _Episode:
        """From its prompt, or from where it was cut."""
        episode, begun = cls(request, request.prompt.token_ids.tolist()), request.begun
        if conversation is not None:
            episode.guest = Guest(conversation.factory, request.prompt)
            episode.schemas = schemas_of(request.prompt.tools)
        if begun is not None:
            episode.ids, episode.log_probs, episode.masks = [begun.token_ids], [begun.log_probs], [begun.loss_mask]
            episode.versions, episode.num_tokens = [begun.versions], len(begun.token_ids)
        return episode

    def append(self, ids: np.ndarray, log_probs: np.ndarray | None, version: int) -> None:
        """``log_probs`` None: nobody sampled them."""
        n = len(ids)
        self.ids.append(ids)
        self.log_probs.append(np.zeros(n, np.float32) if log_probs is None else log_probs)
        self.masks.append(np.full(n, log_probs is not None))
        self.versions.append(np.full(n, version, np.int32))
        self.num_tokens += n

    def rollout(self, reason: StopReason, version: int, reward: float | None) -> Rollout:
        return Rollout(
            prompt_id=self.request.prompt.prompt_id,
            token_ids=np.concatenate(self.ids),
            log_probs=np.concatenate(self.log_probs),
            loss_mask=np.concatenate(self.masks),
            stop_reason=reason,
            policy_version=version,
            reward=reward,
            versions=np.concatenate(self.versions),
        )


@dataclass(frozen=True, slots=True)
class _Action:
    """A call to an environment that is under way."""

    episode: _Episode
    deadline: float
    then: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class _Result:
    action: _Action
    value: Any
    error: BaseException | None


def run_rollouts(
    sampler: Sampler,
    requests: Sequence[RolloutRequest],
    *,
    max_response_tokens: int,
    on_rollout: OnRollout,
    conversation: Conversation | None = None,
    beat: Callable[[], None] = lambda: None,
    more: MoreRequests | None = None,
) -> None:
    """Sample all requests; each rollout goes to ``on_rollout`` once, when it is complete.

    Args:
        sampler: the engine; nothing else may submit to it meanwhile.
        requests: with unique keys.
        max_response_tokens: longest response, tool outputs included.
        on_rollout: takes key and rollout.
        conversation: environments; None = one turn a rollout.
        beat: called at least once an iteration, for a supervisor that wants signs of life.
        more: asked once an iteration for requests to take on besides, until it returns None; or Cut.NOW, which an
            environment cannot take (it would have to be kept, too).
    """
    _Loop(sampler, max_response_tokens, on_rollout, conversation).run(requests, beat, more)


class _Loop:
    """Every episode is in exactly one of two places: with the engine or with its environment."""

    def __init__(
        self, sampler: Sampler, max_response_tokens: int, on_rollout: OnRollout, conversation: Conversation | None
    ) -> None:
        self._sampler = sampler
        self._limit = max_response_tokens
        self._on_rollout = on_rollout
        self._conversation = conversation
        self._sampling: dict[int, _Episode] = {}
        self._acting: dict[int, _Action] = {}
        self._results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        self._rendering = threading.Lock()

    def run(
        self, requests: Sequence[RolloutRequest], beat: Callable[[], None], more: MoreRequests | None = None
    ) -> None:
        new: Sequence[RolloutRequest] | None = requests
        try:
            while self._sampling or self._acting or new is not None:
                for request in new or ():
                    self._submit(_Episode.of(request, self._conversation))
                answer = None if more is None or new is None else more()
                if answer is Cut.NOW:
                    return self._cut()
                new = answer
                for turn in self._sampler.step() if self._sampling else ():
                    self._take_turn(self._sampling.pop(turn.key), turn)
                if not self._sampling and not new and (self._acting or new is not None):
                    self._wait_for_a_result()
                self._take_results()
                self._end_late()
                beat()
        finally:
            for episode in (*self._sampling.values(), *(action.episode for action in self._acting.values())):
                _leave(episode)

    def _submit(self, episode: _Episode) -> None:
        request = episode.request
        so_far = [*episode.prompt_ids, *(int(i) for ids in episode.ids for i in ids)]
        room = min(self._limit - episode.num_tokens, self._sampler.room(len(so_far)))
        self._sampling[request.key] = episode
        seed = turn_seed(request.seed, episode.turn)
        if request.begun is not None:
            seed = part_seed(seed, episode.num_tokens)
        self._sampler.submit(request.key, so_far, seed=seed, max_tokens=room)

    def _cut(self) -> None:
        """Hand over what runs as it is."""
        assert self._conversation is None, "an environment cannot be cut"
        for turn in self._sampler.cut():
            episode = self._sampling.pop(turn.key)
            episode.append(turn.token_ids, turn.log_probs, self._sampler.policy_version)
            self._finish(episode, StopReason.CUT, None)

    def _take_turn(self, episode: _Episode, turn: Turn) -> None:
        episode.append(turn.token_ids, turn.log_probs, self._sampler.policy_version)
        match turn.finish:
            case "stop":
                reason = StopReason.EOS
            case "length":
                reason = StopReason.LENGTH if episode.num_tokens >= self._limit else StopReason.CONTEXT
            case _:
                reason = StopReason.ABORTED
        if self._conversation is None:
            self._finish(episode, reason, None)
        elif reason is StopReason.EOS:
            self._step(episode, self._conversation, turn)
        else:
            self._ask_reward(episode, self._conversation, reason)

    def _step(self, episode: _Episode, conversation: Conversation, turn: Turn) -> None:
        guest, text = episode.guest, conversation.translator.text(turn.token_ids)
        assert guest is not None
        answer = Answer(text=text, calls=conversation.translator.calls(text, episode.schemas), turn=episode.turn)

        def call() -> tuple[np.ndarray | None, float | None]:
            """Tokens of what comes next; or none, and the reward."""
            observation = guest.step(answer)
            if observation.done:
                return None, guest.reward()
            with self._rendering:  # a tokenizer is not made for several threads at once
                return conversation.translator.render(observation.messages), None

        def then(result: tuple[np.ndarray | None, float | None]) -> None:
            tokens, reward = result
            if tokens is None:
                self._finish(episode, StopReason.EOS, reward)
            else:
                self._go_on(episode, conversation, tokens)

        self._act(episode, conversation, call, then)

    def _go_on(self, episode: _Episode, conversation: Conversation, tokens: np.ndarray) -> None:
        """Append what the environment says and let the policy answer, if there is a turn and room left."""
        episode.turn += 1
        length = episode.num_tokens + len(tokens)
        if episode.turn >= conversation.max_turns:
            self._ask_reward(episode, conversation, StopReason.TURNS)
        elif length >= self._limit:
            self._ask_reward(episode, conversation, StopReason.LENGTH)
        elif self._sampler.room(len(episode.prompt_ids) + length) < 1:
            self._ask_reward(episode, conversation, StopReason.CONTEXT)
        else:
            episode.append(tokens, None, self._sampler.policy_version)
            self._submit(episode)

    def _ask_reward(self, episode: _Episode, conversation: Conversation, reason: StopReason) -> None:
        assert episode.guest is not None
        self._act(episode, conversation, episode.guest.reward, lambda reward: self._finish(episode, reason, reward))

    def _act(
        self, episode: _Episode, conversation: Conversation, call: Callable[[], Any], then: Callable[[Any], None]
    ) -> None:
        """Run ``call`` in a thread of its own; ``then`` takes its result here, in the loop."""
        action = _Action(episode, time.monotonic() + conversation.timeout_seconds, then)
        self._acting[episode.request.key] = action
        assert episode.guest is not None
        episode.guest.ask(call, lambda value, error: self._results.put(_Result(action, value, error)))

    def _wait_for_a_result(self) -> None:
        with contextlib.suppress(queue.Empty):
            self._take(self._results.get(timeout=_WAIT_SECONDS))

    def _take_results(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._results.get_nowait())

    def _take(self, result: _Result) -> None:
        key = result.action.episode.request.key
        if self._acting.get(key) is not result.action:
            return  # too late: that rollout is over
        del self._acting[key]
        if result.error is None:
            result.action.then(result.value)
            return
        name = result.action.episode.request.prompt.prompt_id
        _log.warning("the environment of prompt %s failed: %s", name, described(result.error))
        self._finish(result.action.episode, StopReason.TOOL_FAILED, _NOT_JUDGED)

    def _end_late(self) -> None:
        now = time.monotonic()
        for key in [key for key, action in self._acting.items() if action.deadline < now]:
            self._finish(self._acting.pop(key).episode, StopReason.TOOL_TIMEOUT, _NOT_JUDGED)

    def _finish(self, episode: _Episode, reason: StopReason, reward: float | None) -> None:
        _leave(episode)
        self._on_rollout(episode.request.key, episode.rollout(reason, self._sampler.policy_version, reward))


def _leave(episode: _Episode) -> None:
    if episode.guest is not None:
        episode.guest.leave()
