"""``weighting.source`` -> the rule of token credit that it names."""

from __future__ import annotations

from megatron_rest.config import ConfigError, WeightingConfig
from megatron_rest.credit_traits import BUILT_IN, CreditTraits
from megatron_rest.user_code import make
from megatron_rest.weighting.credit import CreditRule
from megatron_rest.weighting.rest import RestWeighting

__all__ = ["find_credit"]


def find_credit(config: WeightingConfig) -> CreditRule:
    """A built-in rule, or one of the user's own, with the options of the section.

    Raises ConfigError: no such rule, options that it does not take, or an object without ``traits`` and ``credit``.
    """
    source = str(config.source)
    place = BUILT_IN[source][0] if source in BUILT_IN else source
    if not place:
        return RestWeighting.from_config(config)
    reference = f"megatron_rest.weighting.{place}" if source in BUILT_IN else source
    rule = make("weighting.source", reference, config.options, "weighting.options")
    if not isinstance(rule, CreditRule):
        raise ConfigError(
            f"weighting.source {source!r} makes a {type(rule).__name__}: a rule of token credit derives from "
            "megatron_rest.weighting.CreditRule"
        )
    if not isinstance(rule.traits, CreditTraits):
        raise ConfigError(
            f"weighting.source {source!r}: its traits are a {type(rule.traits).__name__}, expected CreditTraits("
            "needs=..., scope=..., normalisation=...): what it asks for decides which passes a step makes"
        )
    if rule.traits.follows:
        raise ConfigError(
            f"weighting.source {source!r} declares follows={rule.traits.follows!r}, which ResT's own sources do: keep "
            "what the rule follows in its own state (state_dict), which sees all rows where its scope is the step"
        )
    return rule
