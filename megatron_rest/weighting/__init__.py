"""Regions -> token weights: ResT's reshaping of the policy gradient (arXiv 2509.21826, section 4).

    weighting = RestWeighting.from_config(config.weighting)
    token_weights = weighting(region_ids, progress=(step - 1) / (steps - 1))     # mean 1 over the valid tokens

The weights are numbers; nothing here sees a model, a loss or a process group.  Sources that measure (entropy, score
norms) are fed with sums that the caller has already reduced over its ranks.
"""

from megatron_rest.weighting.curriculum import region_gammas
from megatron_rest.weighting.mass import region_weight_mass
from megatron_rest.weighting.means import RegionMeans, region_sums
from megatron_rest.weighting.rest import RestWeighting
from megatron_rest.weighting.rules import entropy_weights, score_norm_bound, variance_optimal_weights

__all__ = [
    "RegionMeans",
    "RestWeighting",
    "entropy_weights",
    "region_gammas",
    "region_sums",
    "region_weight_mass",
    "score_norm_bound",
    "variance_optimal_weights",
]
