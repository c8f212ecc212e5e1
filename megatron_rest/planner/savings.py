"""What a step need not compute, and what each of these is worth for one plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_rest.credit_traits import BUILT_IN, traits_of
from megatron_rest.passes import has_gradient_without_advantage, keeps_zero_groups
from megatron_rest.planner.plan import Plan

__all__ = ["Saving", "savings_of"]

_EXAMPLE = 0.2  # share of groups without a signal, where none is given
_CUT = 1.05  # copies of a prompt from which on it is worth saying


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """Scoring and update with and without it, all else as planned: seconds, or on CPU operations of a rank."""

    name: str
    before: float
    after: float
    is_used: bool  # in the plan; else what it would be worth
    why: str

    @property
    def factor(self) -> float:
        return self.before / self.after


def savings_of(plan: Plan) -> list[Saving]:
    """One of each kind, whether it pays here or not."""
    return [_shared_prompts(plan), _skipped_scoring(plan), _zero_groups(plan)]


def _shared_prompts(plan: Plan) -> Saving:
    is_used = plan.assumed.shares_prompts
    other = plan.work_under(replace(plan.assumed, shares_prompts=not is_used))
    plain, shared = (other, plan.work) if is_used else (plan.work, other)
    report = shared.packing
    why = f"{report.plain_rows:,} -> {report.rows:,} rows an update"
    if report.prompt_copies > _CUT:
        why += f", a prompt is there {report.prompt_copies:.1f} times: trainer.max_tokens_per_microbatch, replicas"
    if plan.config.trainer.share_prompts == "off":
        why += "; trainer.share_prompts is off"
    elif not is_used:
        why += "; trainer.share_prompts is off with Transformer Engine, whose attention no GPU has shown equal"
    return Saving(
        name="shared prompts",
        before=plan.training_cost(plain),
        after=plan.training_cost(shared),
        is_used=is_used,
        why=why,
    )


def _skipped_scoring(plan: Plan) -> Saving:
    work, c = plan.work, plan.config
    why = f"{work.num_scored} of {work.num_updates} update{'s' if work.num_updates > 1 else ''} of a step scored"
    if traits_of(c.weighting.source).is_scored:
        guessed = "" if c.weighting.source in BUILT_IN else ", as far as a plan knows: it is not imported"
        why += f": weighting.source={c.weighting.source} measures in every step{guessed}"
    elif work.num_scored:
        why += "; loss.old_log_probs=engine needs none"
    return Saving(
        name="skipped scoring",
        before=plan.training_cost(work.with_all_scored()),
        after=plan.training_cost(work),
        is_used=work.num_scored < work.num_updates,
        why=why,
    )


def _zero_groups(plan: Plan) -> Saving:
    share, keeps = plan.zero_groups, keeps_zero_groups(plan.config)
    other = plan.work_under(replace(plan.assumed, zero_groups=0.0 if share else _EXAMPLE))
    every, fewer = (other, plan.work) if share else (plan.work, other)
    why = f"{fewer.left_out:.0%} of the sequences leave, --zero-groups {share:g}"
    if keeps:
        why = f"none leaves: {' and '.join(_kept_by(plan))}"
    elif not share:
        why = f"if {_EXAMPLE:.0%} of the groups had rewards that are all alike; --zero-groups takes a run's share"
    return Saving(
        name="zero groups",
        before=plan.training_cost(every),
        after=plan.training_cost(fewer),
        is_used=bool(share) and not keeps,
        why=why,
    )


def _kept_by(plan: Plan) -> Iterator[str]:
    loss = plan.config.loss
    if keeps_zero_groups(plan.config) and not has_gradient_without_advantage(loss):
        is_credit = traits_of(plan.config.weighting.source).moves_zero
        yield "weighting.source" if is_credit else "advantage.estimator"
    if ":" in loss.function:
        yield "loss.function"
    if loss.entropy_coef:
        yield "loss.entropy_coef"
    if loss.kl_coef:
        yield "loss.kl_coef"
    if str(loss.aggregation) == "reference_code":
        yield "loss.aggregation=reference_code"
