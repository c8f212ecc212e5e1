"""Rewards -> advantages, and log-probs -> loss.  Pure functions of typed inputs; no trainer, no process group.

advantages = group_relative_advantages(rewards)                       # [P, G]
output = rest_policy_loss(LossInputs(...), config.loss)               # loss_sum, num_tokens, metrics
loss = RestPolicyLoss(config.loss)                                     # the same, bound; what a fused head takes
"""

from megatron_rest.algorithms.advantages import group_relative_advantages
from megatron_rest.algorithms.estimators import JudgedRollouts, find_estimator
from megatron_rest.algorithms.policy_loss import RestPolicyLoss, rest_policy_loss
from megatron_rest.algorithms.ratio_losses import RatioLoss, RatioTerms
from megatron_rest.types import BatchTotals, LossInputs, LossOutput

__all__ = [
    "BatchTotals",
    "JudgedRollouts",
    "LossInputs",
    "LossOutput",
    "RatioLoss",
    "RatioTerms",
    "RestPolicyLoss",
    "find_estimator",
    "group_relative_advantages",
    "rest_policy_loss",
]
