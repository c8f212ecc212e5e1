"""Token credit in a step: from microbatches, however they lie, to the rows that a rule sees, and back.

A rule that looks at one rollout gets those of each microbatch as they are.  One that looks at siblings or at the whole
step gets all rows of the step, in the same order on every rank: what was measured elsewhere comes by one all-reduce,
which adds zeros to the one value of each token, so nothing is rounded and no layout changes the result.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.config import ConfigError, LossAggregation, RestConfig
from megatron_rest.credit_traits import BUILT_IN, READS_TOKEN_REWARDS, Normalisation, Scope
from megatron_rest.mcore.policy import Scores
from megatron_rest.trainer.exchange import all_token_values, token_places
from megatron_rest.types import MicroBatch, TrainBatch, TrainSample
from megatron_rest.weighting import Credit, CreditRows, CreditRule

__all__ = ["check_rule", "give_credit"]

_log = logging.getLogger(__name__)


def check_rule(rule: CreditRule, config: RestConfig) -> None:
    """What only the rule itself can tell, against the rest of the configuration.  Raises ConfigError.

    Warns where the reward speaks of turns and the rule looks at totals; of a reward of the user's own that shows with
    the first answers, in :func:`give_credit`.
    """
    traits, source = rule.traits, config.weighting.source
    if "ref_log_probs" in traits.needs and not config.loss.kl_coef:
        raise ConfigError(
            f"weighting.source={source} needs the reference policy's log-probs, which are there with loss.kl_coef "
            "only: set it (1e-9 is a reference without a pull)"
        )
    terms = config.reward.as_terms()
    if "token_rewards" in traits.needs and not any(term.is_foreign for term in terms):
        raise ConfigError(
            f"weighting.source={source} gives credit by what single turns, calls or tokens earned, and "
            f"{' and '.join(term.function for term in terms)} says nothing of them: name a reward that does in "
            "reward.function or reward.terms (megatron_rest.rewards.matched_turns:matched_turns is one)"
        )
    if any(term.function == "matched_turns" for term in terms):
        _warn_if_unread(str(source))
    if traits.moves_zero and config.data.resample_zero_groups:
        raise ConfigError(
            "data.resample_zero_groups draws again where equal rewards teach nothing, and with weighting.source="
            f"{source} they do (its traits say moves_zero): set data.resample_zero_groups=0"
        )
    is_positive = traits.normalisation is Normalisation.POSITIVE
    if is_positive and config.loss.aggregation is LossAggregation.TOKEN_MEAN:
        raise ConfigError(
            f"weighting.source={source}: the sum of its weights is not known before the first forward pass, and "
            "loss.aggregation=token_mean divides by it: set loss.aggregation=sequence_mean"
        )


@functools.cache
def _warn_if_unread(source: str) -> None:
    """Once a process.  Rules of the user's own get such rewards and are taken to read them."""
    if source in BUILT_IN and source not in READS_TOKEN_REWARDS:
        _log.warning(
            "the reward says what single turns, calls or tokens earned, and weighting.source=%s looks at an answer's "
            "total only: choose a rule that reads them (weighting.source=%s), or a reward that gives one number",
            source, ", ".join(sorted(READS_TOKEN_REWARDS)),
        )  # fmt: skip


def give_credit(
    rule: CreditRule,
    batches: Sequence[TrainBatch],
    scores: Sequence[Sequence[Scores]],
    *,
    samples: Sequence[TrainSample],
    rewards: Sequence[float],
    progress: float,
    name: str,
    dp_group: dist.ProcessGroup | None = None,
) -> list[TrainBatch]:
    """``batches`` with token weights and, where the rule changes them, token advantages.

    Args:
        rule: what gives credit; its own state has been updated.
        batches: this replica's microbatches of the step: of all updates, and of what is measured without training.
            Reference log-probs, where a rule needs them, are in them already.
        scores: of the same microbatches; empty where nothing was scored.
        samples: all rollouts of the step, on every rank; ``sequence_id`` is their place.
        rewards: of the same.
        progress: curriculum progress.
        name: of the rule, for messages.
        dp_group: replicas that hold the other microbatches.

    Collectives: where the rule's scope is the group or the step, one SUM all-reduce over ``dp_group`` of float32
    ``[number of statistics, tokens of the step]``; else none.

    Raises:
        ValueError: the rule gave something else than one finite number a row (:meth:`Credit.check`).
    """
    if any(sample.token_rewards is not None for sample in samples):
        _warn_if_unread(name)
    needs = rule.traits.measured
    if rule.traits.scope is Scope.ROLLOUT:
        return [
            replace(batch, microbatches=tuple(
                _alone(rule, m, s, samples, rewards, progress, name)
                for m, s in zip(batch.microbatches, _or_none(part, batch), strict=True)
            ))
            for batch, part in zip(batches, scores, strict=True)
        ]  # fmt: skip
    lengths = [s.num_tokens for s in samples]
    microbatches = [m for batch in batches for m in batch.microbatches]
    measured: dict[str, np.ndarray] = {}
    if needs:
        parts = [s for batch, part in zip(batches, scores, strict=True) for s in _or_none(part, batch)]
        columns = [_statistics(m, s, needs) for m, s in zip(microbatches, parts, strict=True)]
        table = all_token_values(lengths, microbatches, columns, dp_group=dp_group)
        is_row = np.concatenate([s.loss_mask for s in samples])
        measured = {n: row[is_row] for n, row in zip(sorted(needs), table.numpy(), strict=True)}
    rows = CreditRows.of_samples(samples, rewards=rewards, progress=progress, scores=measured)
    credit = _ask(rule, rows, name)
    at = np.flatnonzero(np.concatenate([s.loss_mask for s in samples]))
    whole = [_spread(value, at, sum(lengths)) for value in (credit.weights, credit.advantages)]
    return [
        replace(batch, microbatches=tuple(_taken(m, whole, lengths) for m in batch.microbatches)) for batch in batches
    ]


def _or_none(scores: Sequence[Scores], batch: TrainBatch) -> Sequence[Scores | None]:
    return scores or [None] * len(batch.microbatches)


def _ask(rule: CreditRule, rows: CreditRows, name: str) -> Credit:
    rows.require(rule.traits.needs)
    return rule.credit(rows).check(rows, rule.traits, f"weighting.source={name}")


def _statistics(microbatch: MicroBatch, scores: Scores | None, needs: frozenset[str]) -> Tensor:
    """float32 [needs, loss tokens], in the order of the sorted names."""
    columns = []
    for name in sorted(needs):
        value = microbatch.ref_log_probs if name == "ref_log_probs" else getattr(scores, name, None)
        if value is None:
            raise ValueError(f"token credit needs {name}, and the scoring pass has not measured it")
        columns.append(value.cpu()[microbatch.loss_mask])
    return torch.stack(columns) if columns else torch.zeros(0, int(microbatch.loss_mask.sum()))


def _alone(
    rule: CreditRule,
    microbatch: MicroBatch,
    scores: Scores | None,
    samples: Sequence[TrainSample],
    rewards: Sequence[float],
    progress: float,
    name: str,
) -> MicroBatch:
    """Credit of the rollouts of one microbatch by themselves."""
    mask, needs = microbatch.loss_mask, rule.traits.measured
    mine = torch.unique_consecutive(microbatch.sequence_ids[mask]).tolist()
    table = _statistics(microbatch, scores, needs) if not rule.traits.follows else torch.zeros(0, 0)
    measured = dict(zip(sorted(needs), table.numpy(), strict=True)) if len(table) else {}
    rows = CreditRows.of_samples(
        [samples[i] for i in mine], rewards=[rewards[i] for i in mine], progress=progress, scores=measured
    )
    if rule.traits.follows:  # by the means of the run, not by these tokens
        credit = rule.credit(rows).check(rows, rule.traits, f"weighting.source={name}")
    else:
        credit = _ask(rule, rows, name)
    size, at = len(mask), np.flatnonzero(mask.numpy())
    weights, advantages = (_spread(value, at, size) for value in (credit.weights, credit.advantages))
    return microbatch.with_credit(token_weights=weights, advantages=advantages)


def _spread(values: np.ndarray | None, at: np.ndarray, size: int) -> Tensor | None:
    """float32 [size]: ``values`` at the rows ``at``, 0 elsewhere."""
    if values is None:
        return None
    spread = np.zeros(size, np.float32)
    spread[at] = values
    return torch.from_numpy(spread)


def _taken(microbatch: MicroBatch, whole: Sequence[Tensor | None], lengths: Sequence[int]) -> MicroBatch:
    """The rows of one microbatch out of the tokens of the step."""
    places = token_places(lengths, microbatch)
    taken = []
    for values in whole:
        column = None
        if values is not None:
            column = torch.zeros(len(microbatch.token_ids))
            column[microbatch.loss_mask] = values[places]
        taken.append(column)
    return microbatch.with_credit(token_weights=taken[0], advantages=taken[1])
