"""Which passes a step makes, over which samples: what follows from the configuration alone.  No torch.

What trains asks here, and so does what plans.
"""

from __future__ import annotations

from megatron_rest.config import ConfigError, LossAggregation, LossConfig, ParallelConfig, RestConfig, WeightSource

__all__ = [
    "has_gradient_without_advantage",
    "is_scored",
    "least_microbatches",
    "measured_statistic",
    "microbatches_multiple",
    "shares_prompts",
]

_STATISTICS = {
    WeightSource.ENTROPY_OFFLINE: "entropy",
    WeightSource.ENTROPY_EMA: "entropy",
    WeightSource.VARIANCE_OPTIMAL: "beta",
}


def measured_statistic(source: WeightSource) -> str | None:
    """What token weights want measured in the scoring pass of every step: "entropy", "beta" or None."""
    return _STATISTICS.get(source)


def has_gradient_without_advantage(loss: LossConfig) -> bool:
    """Whether a sequence of advantage 0 changes the gradient.

    Entropy and KL terms do not ask for the advantage, and ``reference_code`` averages over whatever shares a
    microbatch.
    """
    return bool(loss.entropy_coef or loss.kl_coef) or loss.aggregation is LossAggregation.REFERENCE_CODE


def is_scored(config: RestConfig, number: int, *, is_saved: bool = False) -> bool:
    """Whether update ``number`` (from 0) of a step is scored before the first.

    The weights need it if their source measures this step, ratios if an earlier update of the step will have moved the
    policy (and the engine's log-probs do not take their place), a file if the step is saved.
    """
    needs_old = config.loss.old_log_probs == "policy" or is_saved
    return measured_statistic(config.weighting.source) is not None or (number > 0 and needs_old)


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
