"""Which token gets how much of the gradient: ResT's weights by region (arXiv 2509.21826, section 4), and other rules.

    weighting = RestWeighting.from_config(config.weighting)
    token_weights = weighting(region_ids, progress=(step - 1) / (steps - 1))     # mean 1 over the valid tokens

    rule = find_credit(config.weighting)                                         # any rule, by name
    credit = rule.credit(rows)                                                   # token weights, token advantages

``credit.py`` is the interface; a rule is one file, and its line in ``credit_traits.py`` says what it asks for.
Weights and advantages are numbers; nothing here sees a model, a loss or a process group.  Sources that measure
(entropy, score norms) are fed with sums that the caller has already reduced over its ranks.
"""

from megatron_rest.credit_traits import CreditTraits, Normalisation, Scope
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule
from megatron_rest.weighting.curriculum import region_gammas
from megatron_rest.weighting.mass import region_weight_mass
from megatron_rest.weighting.means import RegionMeans, region_sums
from megatron_rest.weighting.named import find_credit
from megatron_rest.weighting.rest import RestWeighting
from megatron_rest.weighting.rules import entropy_weights, score_norm_bound, variance_optimal_weights

__all__ = [
    "Credit",
    "CreditRows",
    "CreditRule",
    "CreditTraits",
    "Normalisation",
    "RegionMeans",
    "RestWeighting",
    "Scope",
    "entropy_weights",
    "find_credit",
    "region_gammas",
    "region_sums",
    "region_weight_mass",
    "score_norm_bound",
    "variance_optimal_weights",
]
