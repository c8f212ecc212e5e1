"""The loss against golden vectors, an fp64 loop over tokens, and identities that must hold exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rest.algorithms import BatchTotals, LossInputs, LossOutput, rest_policy_loss
from megatron_rest.algorithms.kl import kl_estimate
from megatron_rest.config import LossAggregation, LossConfig

PAPER, TOKEN, REFERENCE = LossAggregation
GOLDEN = 1e-6


def inputs_of(
    log_ratio: Tensor,
    advantages: Tensor,
    lengths: list[int],
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    **optional: Any,
) -> LossInputs:
    """Packed sequences of ``lengths``; totals of these alone."""
    mask = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    valid = torch.zeros(len(lengths)).index_add(0, owner, mask.float())
    totals = BatchTotals(
        num_tokens=float(mask.sum()),
        num_sequences=float((valid > 0).sum()),
        weight_sum=float(mask.sum() if weights is None else weights[mask].sum()),
    )
    old = torch.full_like(log_ratio, -1.0)
    return LossInputs(
        log_probs=(old + log_ratio).requires_grad_(),
        old_log_probs=old,
        advantages=advantages,
        loss_mask=mask,
        sequence_lengths=valid[owner].clamp_min(1),
        totals=totals,
        token_weights=weights,
        sequence_ids=owner,
        **optional,
    )


def value(output: LossOutput, inputs: LossInputs) -> float:
    return output.loss_sum.item() / inputs.totals.num_tokens


def mean(output: LossOutput, name: str) -> float:
    total, count = output.metrics[name]
    return (total / count).item()


LOG_RATIO = torch.tensor([0, 0.3, -0.3, 0.1, 0, 0.3, -0.3, 1.5])
ADVANTAGES = torch.tensor([1.0] * 4 + [-1.0] * 4)
WEIGHTS = torch.tensor([1.5, 0.5, 1, 1, 2, 0, 1, 1])
MASK_L2 = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
DUAL = {"dual_clip": 3.0}


def golden(
    mask: Tensor | None = None, weights: Tensor | None = None, **config: Any
) -> tuple[float, LossInputs, LossOutput]:
    inputs = inputs_of(LOG_RATIO, ADVANTAGES, [4, 4], mask, weights)
    output = rest_policy_loss(inputs, LossConfig(dual_clip=3.0, **config))
    return value(output, inputs), inputs, output


class TestL1:
    def test_unweighted(self) -> None:
        token_losses = [-1, -1.2, -0.740818, -1.105171, 1, 1.349859, 0.8, 3]
        for kind in LossAggregation:
            loss, inputs, output = golden(aggregation=kind)
            assert loss == pytest.approx(0.262984, abs=GOLDEN)
            assert loss == pytest.approx(
                sum(token_losses) / 8, abs=GOLDEN
            )  # and seq-mean-token-sum is 8/2 of it: 1.051935
            assert mean(output, "clip_fraction") == 0.25
            assert mean(output, "dual_clip_fraction") == 0.125
            assert mean(output, "clip_fraction_high") == mean(output, "clip_fraction_low") == 0.125
            assert mean(output, "ratio") == pytest.approx(LOG_RATIO.exp().mean().item())
            assert int(output.num_tokens) == 8
            assert inputs.token_weights is None

    @pytest.mark.parametrize("kind", list(LossAggregation))
    def test_weighted_value_and_gradient(self, kind: LossAggregation) -> None:
        loss, inputs, output = golden(weights=WEIGHTS, aggregation=kind)
        assert loss == pytest.approx(0.231751, abs=GOLDEN)
        (output.loss_sum / inputs.totals.num_tokens).backward()
        expected = torch.tensor([-0.1875, 0, -0.092602, -0.138146, 0.25, 0, 0, 0])
        torch.testing.assert_close(inputs.log_probs.grad, expected, atol=GOLDEN, rtol=0)

    def test_scale_of_the_weights(self) -> None:
        base = {kind: golden(weights=WEIGHTS, aggregation=kind)[0] for kind in LossAggregation}
        scaled = {kind: golden(weights=7 * WEIGHTS, aggregation=kind)[0] for kind in LossAggregation}
        assert scaled[TOKEN] == pytest.approx(base[TOKEN], rel=1e-6)
        assert scaled[REFERENCE] == pytest.approx(base[REFERENCE], rel=1e-6)
        assert scaled[PAPER] == pytest.approx(7 * base[PAPER], rel=1e-6)


class TestL2:
    def test_whole_batch(self) -> None:
        assert golden(MASK_L2, aggregation=TOKEN)[0] == pytest.approx(-0.118192, abs=GOLDEN)
        assert golden(MASK_L2, WEIGHTS, aggregation=TOKEN)[0] == pytest.approx(-0.168164, abs=GOLDEN)
        assert golden(MASK_L2, WEIGHTS, aggregation=REFERENCE)[0] == pytest.approx(-0.168164, abs=GOLDEN)
        assert golden(MASK_L2, WEIGHTS, aggregation=PAPER)[0] == pytest.approx(0.026530, abs=GOLDEN)

    def test_two_microbatches(self) -> None:
        """Only the published form depends on the split."""
        for kind, expected in ((REFERENCE, 0.026530), (TOKEN, -0.168164), (PAPER, 0.026530)):
            assert split_golden(MASK_L2, WEIGHTS, kind) == pytest.approx(expected, abs=GOLDEN)


def split_golden(mask: Tensor, weights: Tensor, kind: LossAggregation) -> float:
    whole = inputs_of(LOG_RATIO, ADVANTAGES, [4, 4], mask, weights)
    total = 0.0
    for part in (slice(0, 4), slice(4, 8)):
        micro = cut(whole, part)
        total += rest_policy_loss(micro, LossConfig(dual_clip=3.0, aggregation=kind)).loss_sum.item()
    return total / whole.totals.num_tokens


def cut(inputs: LossInputs, part: slice | Tensor) -> LossInputs:
    """Some tokens of ``inputs``, with the same totals."""
    names = (
        "log_probs",
        "old_log_probs",
        "advantages",
        "loss_mask",
        "sequence_lengths",
        "token_weights",
        "sequence_ids",
    )
    names += ("entropy", "rollout_log_probs", "ref_log_probs")
    values = {name: getattr(inputs, name) for name in names}
    return replace(inputs, **{name: v if v is None else v[part] for name, v in values.items()})


def test_l3_a_microbatch_without_weight() -> None:
    weights = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])
    assert golden(weights=weights, aggregation=TOKEN)[0] == pytest.approx(-0.980273, abs=GOLDEN)
    everything = torch.ones(8, dtype=torch.bool)
    assert split_golden(everything, weights, REFERENCE) == pytest.approx(-0.490136, abs=GOLDEN)
    assert split_golden(everything, weights, TOKEN) == pytest.approx(-0.980273, abs=GOLDEN)


class TestL4:
    @pytest.mark.parametrize("kind", list(LossAggregation))
    def test_uniform_weights_are_no_weights_bit_for_bit(self, kind: LossAggregation) -> None:
        generator = torch.Generator().manual_seed(3)
        log_ratio = torch.randn(301, generator=generator)
        advantages = torch.randn(301, generator=generator)
        mask = torch.rand(301, generator=generator) < 0.8
        results = []
        for weights in (None, torch.ones(301)):
            inputs = inputs_of(log_ratio, advantages, [100, 200, 1], mask, weights)
            output = rest_policy_loss(inputs, LossConfig(aggregation=kind, dual_clip=3.0))
            output.loss_sum.backward()
            results.append((output.loss_sum.detach(), inputs.log_probs.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])

    @pytest.mark.parametrize("kind", list(LossAggregation))
    @pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
    def test_masked_positions_may_hold_anything(self, kind: LossAggregation, poison: float) -> None:
        config = LossConfig(
            aggregation=kind, dual_clip=3.0, kl_coef=0.1, entropy_coef=0.01, tis_cap=2.0, tis_level="sequence"
        )
        base = full_inputs()
        clean = evaluate(base, config)
        names = ("log_probs", "old_log_probs", "advantages", "token_weights", "sequence_lengths", "entropy")
        names += ("rollout_log_probs", "ref_log_probs")
        bad = {name: torch.where(base.loss_mask, getattr(base, name).detach(), poison) for name in names}
        bad["log_probs"].requires_grad_()
        bad["entropy"].requires_grad_()
        dirty = evaluate(replace(base, **bad), config)
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b)


def full_inputs(seed: int = 5, requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> LossInputs:
    """Three sequences with masked gaps and every optional input."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(40, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(40, generator=generator) < 0.75
    base = inputs_of(
        normal(0.4),
        torch.tensor([1.3, -0.4, -1.1], dtype=dtype).repeat_interleave(torch.tensor([9, 20, 11])),
        [9, 20, 11],
        mask,
        normal().abs() + 0.1,
        entropy=normal().abs().requires_grad_(requires_grad),
        rollout_log_probs=-1.0 + normal(0.2),
        ref_log_probs=-1.0 + normal(0.5),
    )
    return replace(base, sequence_lengths=base.sequence_lengths.to(dtype))


def evaluate(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    inputs.log_probs.grad = inputs.entropy.grad = None  # type: ignore[union-attr]
    output = rest_policy_loss(inputs, config)
    assert all(math.isfinite(total) for total, _ in output.metrics.values())
    output.loss_sum.backward()
    entropy_grad = inputs.entropy.grad  # type: ignore[union-attr]
    return output.loss_sum.detach(), inputs.log_probs.grad, torch.zeros(1) if entropy_grad is None else entropy_grad  # type: ignore[return-value]


def by_hand(i: LossInputs, c: LossConfig) -> float:
    """The paper's formulas, one token at a time, in Python floats."""
    tokens = [t for t in range(len(i.log_probs)) if i.loss_mask[t]]
    lp, old, adv = i.log_probs.tolist(), i.old_log_probs.tolist(), i.advantages.tolist()
    policy, plain = 0.0, 0.0
    totals = i.totals
    for t in tokens:
        ratio = math.exp(lp[t] - old[t])
        low, high = 1 - c.clip_low, 1 + c.clip_high
        loss = max(-adv[t] * ratio, -adv[t] * min(max(ratio, low), high))
        if c.dual_clip is not None and adv[t] < 0:
            loss = min(loss, -c.dual_clip * adv[t])
        if c.tis_cap is not None:
            same = [u for u in tokens if i.sequence_ids[u] == i.sequence_ids[t]] if c.tis_level == "sequence" else [t]
            loss *= min(math.exp(sum(old[u] - i.rollout_log_probs[u].item() for u in same)), c.tis_cap)
        d = lp[t] - i.ref_log_probs[t].item()
        kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[c.kl_estimator]
        weight = i.token_weights[t].item()
        is_paper = c.aggregation is PAPER
        share = 1 / (i.sequence_lengths[t].item() * totals.num_sequences) if is_paper else 1 / totals.num_tokens
        policy += loss * weight * (share if is_paper else 1 / totals.weight_sum)
        plain += (c.kl_coef * kl - c.entropy_coef * i.entropy[t].item()) * share
    return policy + plain


@pytest.mark.parametrize("kind", [PAPER, TOKEN])
@pytest.mark.parametrize(
    "terms",
    [
        {},
        {"dual_clip": 1.5, "clip_low": 0.1, "clip_high": 0.28},
        {"kl_coef": 0.3, "kl_estimator": "k1"},
        {"kl_coef": 0.3, "kl_estimator": "k2"},
        {"kl_coef": 0.3, "kl_estimator": "k3", "entropy_coef": 0.2},
        {"tis_cap": 1.1},
        {"tis_cap": 1.1, "tis_level": "sequence"},
    ],
)
def test_against_a_loop_over_tokens(kind: LossAggregation, terms: dict[str, Any]) -> None:
    config = LossConfig(aggregation=kind, **terms)
    inputs = full_inputs(dtype=torch.float64)
    output = rest_policy_loss(inputs, config)
    assert value(output, inputs) == pytest.approx(by_hand(inputs, config), rel=1e-10)


@pytest.mark.parametrize("kind", list(LossAggregation))
def test_gradient_against_finite_differences(kind: LossAggregation) -> None:
    config = LossConfig(aggregation=kind, dual_clip=3.0, kl_coef=0.1, entropy_coef=0.05, tis_cap=2.0)
    inputs = full_inputs(dtype=torch.float64)

    def loss(log_probs: Tensor, entropy: Tensor) -> Tensor:
        return rest_policy_loss(replace(inputs, log_probs=log_probs, entropy=entropy), config).loss_sum

    assert torch.autograd.gradcheck(loss, (inputs.log_probs, inputs.entropy), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("kind", list(LossAggregation))
def test_first_step_identities(kind: LossAggregation) -> None:
    """log_probs == old_log_probs: ratio exactly 1, nothing clipped, gradient exactly -A w / T_i / N."""
    base = full_inputs()
    inputs = replace(base, log_probs=base.old_log_probs.clone().requires_grad_())
    output = rest_policy_loss(inputs, LossConfig(aggregation=kind, dual_clip=3.0))
    assert mean(output, "ratio") == 1.0
    assert mean(output, "approx_kl") == 0.0
    assert mean(output, "clip_fraction") == mean(output, "dual_clip_fraction") == 0.0
    if kind is PAPER:
        output.loss_sum.backward()
        factor = inputs.totals.num_tokens / inputs.totals.num_sequences
        expected = -inputs.advantages * inputs.token_weights / inputs.sequence_lengths * factor  # type: ignore[operator]
        expected = torch.where(inputs.loss_mask, expected, 0.0)
        torch.testing.assert_close(inputs.log_probs.grad, expected, rtol=1e-6, atol=0)


def test_only_log_probs_and_entropy_carry_gradient() -> None:
    inputs = full_inputs()
    names = ("old_log_probs", "advantages", "token_weights", "rollout_log_probs", "ref_log_probs")
    tracked = {name: getattr(inputs, name).clone().requires_grad_() for name in names}
    output = rest_policy_loss(replace(inputs, **tracked), LossConfig(kl_coef=0.1, tis_cap=2.0))
    output.loss_sum.backward()
    assert all(tensor.grad is None for tensor in tracked.values())
    assert inputs.log_probs.grad is not None
    assert inputs.entropy.grad is None  # type: ignore[union-attr]  # no bonus: a metric only
    assert not any(total.requires_grad for total, _ in output.metrics.values())


@pytest.mark.parametrize("kind", list(LossAggregation))
def test_an_empty_microbatch_gives_zero_with_a_graph(kind: LossAggregation) -> None:
    base = full_inputs()
    nothing = replace(base, loss_mask=torch.zeros_like(base.loss_mask))
    output = rest_policy_loss(nothing, LossConfig(aggregation=kind, kl_coef=0.1, entropy_coef=0.1))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0
    assert int(output.num_tokens) == 0
    assert torch.equal(nothing.log_probs.grad, torch.zeros(40))  # type: ignore[arg-type]


def test_extreme_log_ratios_stay_finite() -> None:
    log_ratio = torch.tensor([500.0, -500.0, 500.0, -500.0])
    inputs = inputs_of(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), [2, 2], ref_log_probs=torch.full((4,), 300.0))
    output = rest_policy_loss(inputs, LossConfig(kl_coef=0.1))
    output.loss_sum.backward()
    assert torch.isfinite(output.loss_sum)
    assert torch.isfinite(inputs.log_probs.grad).all()  # type: ignore[arg-type]


def test_kl_estimators() -> None:
    """k1 and k3 are unbiased: their exact mean over the policy is the KL (3-way distributions, fp64)."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
    kl = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        assert (p * kl_estimate(p.log(), q.log(), estimator=estimator)).sum() == pytest.approx(kl.item())
    assert (kl_estimate(p.log(), q.log(), estimator="k3") >= 0).all()
    torch.testing.assert_close(kl_estimate(p.log(), q.log(), estimator="k2"), 0.5 * (p / q).log() ** 2)
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(p, q, estimator="k4")


@pytest.mark.parametrize(("estimator", "of"), [("k1", "nothing"), ("k2", "policy"), ("k3", "reference")])
def test_expected_gradients_of_the_kl_estimators(estimator: str, of: str) -> None:
    """Mean over the policy's own samples: k1 none, k2 of KL(policy || ref), k3 of KL(ref || policy)."""
    logits = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
    log_p = torch.log_softmax(logits, -1)
    estimate = (log_p.exp().detach() * kl_estimate(log_p, q.log(), estimator=estimator)).sum()
    exact = {
        "nothing": 0.0 * log_p.sum(),
        "policy": (log_p.exp() * (log_p - q.log())).sum(),
        "reference": (q * (q.log() - log_p)).sum(),
    }[of]
    (got,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_wrong_inputs_say_what_is_wrong() -> None:
    base = full_inputs()
    for change, config, message in (
        ({"advantages": torch.ones(3)}, {}, r"advantages has shape \(3,\), expected \(40,\)"),
        ({"loss_mask": torch.ones(40)}, {}, "expected torch.bool"),
        ({"log_probs": torch.ones(4, 10)}, {}, r"expected \[T\]"),
        ({"ref_log_probs": None}, {"kl_coef": 0.1}, "needs ref_log_probs"),
        ({"entropy": None}, {"entropy_coef": 0.1}, "needs entropy"),
        ({"rollout_log_probs": None}, {"tis_cap": 2.0}, "needs rollout_log_probs"),
        ({"sequence_ids": None}, {"tis_cap": 2.0, "tis_level": "sequence"}, "needs sequence_ids"),
        ({"sequence_lengths": torch.full((40,), 99.0)}, {"tis_cap": 2.0, "tis_level": "sequence"}, "a sequence is cut"),
    ):
        with pytest.raises(ValueError, match=message):
            rest_policy_loss(replace(base, **change), LossConfig(**config))  # type: ignore[arg-type]
