"""Loss and gradient do not depend on how a step is split: microbatches, packing order, data- and context-parallel
ranks.

Every rank holds the same small policy (one linear layer) and a part of the step's tokens; gradients are summed over
ranks as Megatron sums them with ``calculate_per_token_loss`` (sum, then one division by the global token count).
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.algorithms import BatchTotals, LossInputs, rest_policy_loss
from megatron_rest.config import LossAggregation, LossConfig
from megatron_rest.weighting import RestWeighting
from tests.helpers.distributed import run_distributed

TOLERANCE = 1e-6  # relative to the largest gradient entry, float32
HIDDEN, VOCAB = 8, 13
LENGTHS = (5, 17, 1, 9, 30, 12, 3, 8)
SPLITS = ("whole", "one_a_sequence", "pairs", "shuffled_thirds", "tokens_cut_anywhere")


def step_data() -> dict[str, Tensor]:
    """One optimiser step: eight packed sequences with masked gaps and ResT weights."""
    generator = torch.Generator().manual_seed(11)
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    n = len(owner)
    mask = torch.rand(n, generator=generator) < 0.8
    regions = torch.randint(1, 6, (n,), generator=generator)
    count = torch.zeros(len(LENGTHS)).index_add(0, owner, mask.float())
    labels = torch.randint(0, VOCAB, (n,), generator=generator)
    hidden = torch.randn(n, HIDDEN, generator=generator)
    return {
        "hidden": hidden,
        "labels": labels,
        "mask": mask,
        "owner": owner,
        "advantages": torch.randn(len(LENGTHS), generator=generator)[owner],
        "lengths": count[owner].clamp_min(1),
        "weights": RestWeighting.paper().packed(regions, owner, progress=0.4, loss_mask=mask),
        "old": -2.5 + 0.6 * torch.randn(n, generator=generator),
        "ref": -2.5 + 0.3 * torch.randn(n, generator=generator),
    }


def totals_of(data: dict[str, Tensor]) -> BatchTotals:
    mask = data["mask"]
    return BatchTotals(
        num_tokens=float(mask.sum()),
        num_sequences=float(len(torch.unique(data["owner"][mask]))),
        weight_sum=float(data["weights"][mask].double().sum()),
    )


def parts_of(split: str, owner: Tensor) -> list[Tensor]:
    """Token indices of each microbatch."""
    everything = torch.arange(len(owner))
    if split == "whole":
        return [everything]
    if split == "tokens_cut_anywhere":  # what context parallelism does to a sequence
        return [everything[0::3], everything[1::3], everything[2::3]]
    order = torch.arange(len(LENGTHS))
    if split == "shuffled_thirds":
        order = torch.tensor([6, 1, 4, 0, 7, 2, 5, 3])
    size = {"one_a_sequence": 1, "pairs": 2, "shuffled_thirds": 3}[split]
    groups = [torch.cat([everything[owner == s] for s in chunk]) for chunk in order.split(size)]
    return [*groups, everything[:0]]  # an empty microbatch takes part


def accumulate(weight: Tensor, parts: list[Tensor], kind: LossAggregation) -> tuple[Tensor, Tensor]:
    """Sum of losses and of gradients over this rank's microbatches."""
    data = step_data()
    totals = totals_of(data)
    config = LossConfig(aggregation=kind, dual_clip=3.0, kl_coef=0.05, entropy_coef=0.01)
    total = torch.zeros(())
    for part in parts:
        logits = data["hidden"][part] @ weight.T
        log_p = torch.log_softmax(logits, -1)
        inputs = LossInputs(
            log_probs=log_p.gather(1, data["labels"][part, None]).squeeze(1),
            entropy=-(log_p.exp() * log_p).sum(-1),
            old_log_probs=data["old"][part],
            advantages=data["advantages"][part],
            loss_mask=data["mask"][part],
            sequence_lengths=data["lengths"][part],
            token_weights=data["weights"][part],
            ref_log_probs=data["ref"][part],
            totals=totals,
        )
        loss = rest_policy_loss(inputs, config).loss_sum
        loss.backward()
        total = total + loss.detach()
    grad = weight.grad if weight.grad is not None else torch.zeros_like(weight)
    return total / totals.num_tokens, grad / totals.num_tokens


def policy() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()


def worker(rank: int, world_size: int) -> dict[tuple[str, str], tuple[float, list[float]]]:
    results = {}
    for kind in (LossAggregation.SEQUENCE_MEAN, LossAggregation.TOKEN_MEAN):
        for split in SPLITS:
            parts = parts_of(split, step_data()["owner"])
            loss, grad = accumulate(policy(), parts[rank::world_size], kind)
            dist.all_reduce(loss)
            dist.all_reduce(grad)
            results[str(kind), split] = (loss.item(), grad.flatten().tolist())
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradient_do_not_depend_on_the_split(world_size: int) -> None:
    ranks = run_distributed(worker, world_size)
    for kind in (LossAggregation.SEQUENCE_MEAN, LossAggregation.TOKEN_MEAN):
        loss, grad = accumulate(policy(), parts_of("whole", step_data()["owner"]), kind)
        for split in SPLITS:
            for result in ranks:
                got_loss, got_grad = result[str(kind), split]
                assert got_loss == pytest.approx(loss.item(), rel=TOLERANCE)
                difference = (torch.tensor(got_grad) - grad.flatten()).abs().max()
                assert difference <= TOLERANCE * grad.abs().max(), (kind, split)


def test_the_published_aggregation_does_depend_on_it() -> None:
    """Why ``reference_code`` is for parity only."""
    owner = step_data()["owner"]
    whole, _ = accumulate(policy(), parts_of("whole", owner), LossAggregation.REFERENCE_CODE)
    split, _ = accumulate(policy(), parts_of("one_a_sequence", owner), LossAggregation.REFERENCE_CODE)
    assert abs(whole - split) > 0.01 * abs(whole)
