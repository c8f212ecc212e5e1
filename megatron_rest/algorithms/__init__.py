"""Rewards -> advantages, and log-probs -> loss.  Pure functions of typed inputs; no trainer, no process group.

advantages = group_relative_advantages(rewards)                       # [P, G]
output = rest_policy_loss(LossInputs(...), config.loss)               # loss_sum, num_tokens, metrics
"""

from megatron_rest.algorithms.advantages import group_relative_advantages
from megatron_rest.algorithms.policy_loss import rest_policy_loss
from megatron_rest.types import BatchTotals, LossInputs, LossOutput

__all__ = ["BatchTotals", "LossInputs", "LossOutput", "group_relative_advantages", "rest_policy_loss"]
