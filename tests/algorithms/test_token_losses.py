"""Losses without known totals, and losses token by token: the two things that an embedding loop and a fused head ask.

1. microbatches one by one, totals unknown: sum of loss_sum over sum of num_tokens is the loss of the whole
2. token_losses add up to loss_sum, those of some rows are those rows of all
3. on-policy without old log-probs: ratio 1, gradient of the plain policy gradient
4. what cannot be computed is refused by name
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from megatron_rest.algorithms import BatchTotals, LossInputs, RestPolicyLoss
from megatron_rest.config import LossAggregation, LossConfig

LENGTHS = [5, 1, 7, 3]
SEPARABLE = [
    LossConfig(dual_clip=3.0),
    LossConfig(aggregation=LossAggregation.TOKEN_MEAN, entropy_coef=0.1, kl_coef=0.05),
    LossConfig(tis_cap=2.0, kl_coef=0.05, kl_estimator="k2"),
]


@pytest.fixture
def inputs() -> LossInputs:
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return -torch.rand(sum(LENGTHS), generator=generator) * 2

    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = torch.ones(len(owner), dtype=torch.bool)
    mask[[2, 8]] = False
    counts = torch.zeros(len(LENGTHS)).index_add(0, owner, mask.float())
    weights = torch.where(mask, 0.5 + torch.rand(len(owner), generator=generator), 0.0)
    weights = weights / (torch.zeros(len(LENGTHS)).index_add(0, owner, weights) / counts)[owner]  # mean 1 a sequence
    return LossInputs(
        log_probs=draw().requires_grad_(),
        old_log_probs=draw(),
        rollout_log_probs=draw(),
        ref_log_probs=draw(),
        entropy=-draw(),
        advantages=draw() + 1,
        loss_mask=mask,
        sequence_lengths=counts[owner],
        sequence_ids=owner,
        token_weights=weights,
        totals=BatchTotals(
            num_tokens=float(mask.sum()), num_sequences=float(len(LENGTHS)), weight_sum=float(mask.sum())
        ),
    )


def rows_of(inputs: LossInputs, rows: slice | torch.Tensor) -> LossInputs:
    values = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return LossInputs(**{k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in values.items()})


@pytest.mark.parametrize("config", SEPARABLE[:2])
def test_unknown_totals_give_the_loss_of_the_whole(config, inputs):
    loss = RestPolicyLoss(config)
    whole = loss(inputs)
    expected = whole.loss_sum / inputs.totals.num_tokens
    [gradient] = torch.autograd.grad(expected, inputs.log_probs)
    parts = [loss(replace(rows_of(inputs, part), totals=None)) for part in (slice(0, 6), slice(6, 16))]
    value = sum(p.loss_sum for p in parts) / sum(p.num_tokens for p in parts)
    [found] = torch.autograd.grad(value, inputs.log_probs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, gradient)
    is_mean_of_sequences = config.aggregation is LossAggregation.SEQUENCE_MEAN
    assert [int(p.num_tokens) for p in parts] == ([2, 2] if is_mean_of_sequences else [5, 9])


@pytest.mark.parametrize("config", SEPARABLE)
def test_token_losses_add_up_and_need_no_other_token(config, inputs):
    loss = RestPolicyLoss(config)
    assert loss.is_token_separable
    losses = loss.token_losses(inputs)
    torch.testing.assert_close(losses.sum(), loss(inputs).loss_sum)
    assert not losses[~inputs.loss_mask].any()
    for rows in (slice(3, 9), torch.tensor([0, 4, 5, 15])):
        torch.testing.assert_close(loss.token_losses(rows_of(inputs, rows)), losses[rows], rtol=0, atol=0)


@pytest.mark.parametrize(
    "config", [LossConfig(aggregation=LossAggregation.REFERENCE_CODE), LossConfig(tis_cap=2.0, tis_level="sequence")]
)
def test_losses_that_need_other_tokens_say_so(config, inputs):
    loss = RestPolicyLoss(config)
    assert not loss.is_token_separable
    torch.testing.assert_close(loss.token_losses(inputs).sum(), loss(inputs).loss_sum)


def test_without_old_log_probs_every_ratio_is_one(inputs):
    loss = RestPolicyLoss(LossConfig())
    output = loss(replace(inputs, old_log_probs=None))
    assert output.metrics["ratio"][0] == output.metrics["ratio"][1]
    [gradient] = torch.autograd.grad(output.loss_sum, inputs.log_probs)
    totals = inputs.totals
    expected = -inputs.advantages * inputs.token_weights / inputs.sequence_lengths
    expected = torch.where(inputs.loss_mask, expected * totals.num_tokens / totals.num_sequences, 0.0)
    torch.testing.assert_close(gradient, expected)


def test_refusals(inputs):
    with pytest.raises(ValueError, match="a sequence is cut"):
        RestPolicyLoss(LossConfig())(replace(rows_of(inputs, slice(0, 8)), totals=None))
    with pytest.raises(ValueError, match="needs totals in LossInputs"):
        RestPolicyLoss(LossConfig(aggregation=LossAggregation.REFERENCE_CODE))(replace(inputs, totals=None))
