"""Which passes a step makes, over which samples: what follows from the configuration alone.  No torch.

What trains asks here, and so does what plans.
"""

from __future__ import annotations

from megatron_rest.config import ConfigError, LossAggregation, LossConfig, ParallelConfig, RestConfig
from megatron_rest.credit_traits import CreditTraits, traits_of

__all__ = [
    "has_gradient_without_advantage",
    "is_scored",
    "keeps_zero_groups",
    "least_microbatches",
    "measured_statistic",
    "microbatches_multiple",
    "shares_prompts",
]


def measured_statistic(source: str) -> str | None:
    """What token weights follow over the run, region by region: "entropy", "beta" or None."""
    return traits_of(source).follows or None


def has_gradient_without_advantage(loss: LossConfig) -> bool:
    """Whether a token of advantage 0 changes the gradient.

    Entropy and KL terms do not ask for the advantage, ``reference_code`` averages over whatever shares a microbatch,
    and of a function of the user's own nothing is known.
    """
    has_terms = bool(loss.entropy_coef or loss.kl_coef) or ":" in loss.function
    return has_terms or loss.aggregation is LossAggregation.REFERENCE_CODE


def keeps_zero_groups(config: RestConfig, traits: CreditTraits | None = None) -> bool:
    """Whether rollouts whose advantage is 0 are trained on.

    ``traits`` are those of the rule of token credit, where it is at hand; else what the configuration tells of it.
    """
    traits = traits_of(config.weighting.source) if traits is None else traits
    is_of_step = config.advantage.estimator == "reinforce_pp"  # equal rewards of a group differ from those of others
    return has_gradient_without_advantage(config.loss) or traits.moves_zero or is_of_step


def is_scored(config: RestConfig, number: int, *, is_saved: bool = False, traits: CreditTraits | None = None) -> bool:
    """Whether update ``number`` (from 0) of a step is scored before the first.

    Token credit needs it if its rule measures something, ratios if an earlier update of the step will have moved the
    policy (and the engine's log-probs do not take their place), a file if the step is saved.
    """
    traits = traits_of(config.weighting.source) if traits is None else traits
    needs_old = config.loss.old_log_probs == "policy" or is_saved
    return traits.is_scored or (number > 0 and needs_old)


def shares_prompts(config: RestConfig, *, has_transformer_engine: bool) -> bool:
    """``trainer.share_prompts`` as it is meant there; :class:`ConfigError` where the attention cannot do it."""
    wanted = config.trainer.share_prompts
    if wanted == "on" and has_transformer_engine:
        raise ConfigError(
            "trainer.share_prompts=on: Transformer Engine's attention is not known to be exact where answers continue "
            "a prompt: set auto or off"
        )
    return wanted != "off" and not has_transformer_engine


def least_microbatches(parallel: ParallelConfig) -> int:
    """Of a replica and update, if it has sequences enough: fewer would leave pipeline stages idle."""
    stages = parallel.pipeline_parallel
    return 2 * stages if stages > 1 else 1


def microbatches_multiple(parallel: ParallelConfig) -> int:
    """The number of microbatches is a multiple of it: interleaved schedules deal them out in rounds of the stages."""
    return parallel.pipeline_parallel if parallel.virtual_pipeline > 1 else 1
