"""How long prompts and responses are: as the prepared data says, as the caller says, or by the limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rest.config import ConfigError, RestConfig
from megatron_rest.data.prompt_files import map_shard, read_manifest, token_counts

__all__ = ["DrawnSample", "Lengths"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnSample:
    """A sequence of which only lengths are known; packing looks at nothing else."""

    prompt: int
    response: int
    group_id: int

    @property
    def num_tokens(self) -> int:
        return self.prompt + self.response

    @property
    def num_loss_tokens(self) -> int:
        return self.response

    @property
    def first_loss(self) -> int:
        return self.prompt

    def head(self, count: int) -> np.ndarray:
        """All 0: those of one group are the same, and others are not compared."""
        return np.zeros(count, np.int32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lengths:
    """Tokens that a step draws from."""

    prompts: np.ndarray  # int64 [n]
    responses: np.ndarray  # int64 [m]
    prompt_source: str
    response_source: str

    @classmethod
    def of(cls, config: RestConfig, *, prompt: float = 0, response: float = 0) -> Lengths:
        """Means that the caller gives go before the folder ``data.train``, that before half of the limits.

        Around a mean, lengths are taken to be spread evenly by half of it to both sides, or as far as the limit.
        References stand for responses: what a policy will write is not known before a run.
        """
        most_prompt, most_response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
        if prompt > most_prompt or response > most_response:
            raise ConfigError(
                f"a mean of {prompt:g} + {response:g} tokens is above data.max_prompt_tokens {most_prompt} + "
                f"rollout.max_response_tokens {most_response}: longer prompts are left out, responses end there"
            )
        prompts, responses, why_not = _of_data(config)
        prompt_source = f"{len(prompts)} prompts of {config.data.train}"
        response_source = "their references, at most rollout.max_response_tokens"
        if prompt or not len(prompts):
            prompts = _around(prompt or most_prompt / 2, most_prompt)
            prompt_source = "--mean-prompt" if prompt else f"half of data.max_prompt_tokens ({why_not})"
        if response or not len(responses):
            responses = _around(response or most_response / 2, most_response)
            response_source = "--mean-response" if response else f"half of rollout.max_response_tokens ({why_not})"
        return cls(prompts=prompts, responses=responses, prompt_source=prompt_source, response_source=response_source)

    @property
    def prompt(self) -> float:
        """Mean."""
        return float(self.prompts.mean())

    @property
    def response(self) -> float:
        """Mean."""
        return float(self.responses.mean())

    def draw(self, count: int, *, group_size: int, seed: int) -> list[DrawnSample]:
        """``count`` sequences in groups of ``group_size``, the last one smaller if need be."""
        rng = np.random.default_rng(seed)
        prompts = rng.choice(self.prompts, -(-count // group_size)).tolist()
        responses = rng.choice(self.responses, count).tolist()
        return [
            DrawnSample(prompt=prompts[i // group_size], response=response, group_id=i // group_size)
            for i, response in enumerate(responses)
        ]


def _of_data(config: RestConfig) -> tuple[np.ndarray, np.ndarray, str]:
    """Prompts that a run would use and their references; empty, and why, where they cannot be read here."""
    nothing, folder = np.zeros(0, np.int64), Path(config.data.train)
    if not config.data.train:
        return nothing, nothing, "data.train is not set"
    if not folder.is_dir():
        return nothing, nothing, f"{folder} is not on this machine"
    try:
        batches = [batch for entry in read_manifest(folder)["outputs"] for batch in map_shard(folder, entry)]
    except ValueError as error:
        return nothing, nothing, f"data.train cannot be read: {error}"
    prompts, answers = (token_counts(batches, name) for name in ("prompt_token_ids", "answer_token_ids"))
    most = config.rollout.max_response_tokens
    fits = (prompts > 0) & (prompts <= config.data.max_prompt_tokens)
    if config.data.require_reachable:
        fits &= answers <= most
    used = np.flatnonzero(fits)[: config.data.max_prompts or None]
    if not len(used):
        return nothing, nothing, f"none of the {len(prompts)} prompts of {folder} is within the limits"
    return prompts[used], answers[used].clip(1, most), ""


def _around(mean: float, most: int) -> np.ndarray:
    """int64 [101]: evenly spread by half of ``mean`` to both sides, or as far as ``most``."""
    half = max(min(mean / 2, most - mean), 0.0)
    return np.linspace(mean - half, mean + half, 101).round().astype(np.int64).clip(1)
