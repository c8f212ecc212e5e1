"""GSPO, CISPO, SAPO and losses of one's own against float64 loops, values and gradients; what a head may take apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_rest.algorithms import BatchTotals, LossInputs, RatioLoss, RatioTerms, RestPolicyLoss
from megatron_rest.config import LOSS_NAMES, ConfigError, LossConfig, load, validate

LENGTHS = (5, 1, 4)
TOTALS = BatchTotals(num_tokens=10, num_sequences=3, weight_sum=10)


def inputs(seed: int = 0, *, moved: bool = True) -> LossInputs:
    """Three answers in one microbatch with padding between and behind them; NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    owner = torch.tensor([-1, 4, 4, 4, 4, 4, -1, 9, -1, -1, 2, 2, 2, 2, -1])
    lengths = torch.ones(15, dtype=torch.float64)
    lengths[mask] = torch.tensor([n for n in LENGTHS for _ in range(n)], dtype=torch.float64)
    old = -torch.rand(15, generator=generator, dtype=torch.float64) * 3
    log_probs = old + 0.4 * torch.randn(15, generator=generator, dtype=torch.float64)
    nowhere = torch.full((15,), torch.nan, dtype=torch.float64)
    advantages = torch.randn(15, generator=generator, dtype=torch.float64)
    return LossInputs(
        log_probs=torch.where(mask, log_probs, nowhere).requires_grad_(),
        old_log_probs=torch.where(mask, old, nowhere) if moved else None,
        advantages=advantages,
        loss_mask=mask,
        sequence_lengths=lengths,
        sequence_ids=owner,
        token_weights=torch.rand(15, generator=generator, dtype=torch.float64),
        totals=TOTALS,
    )


CONFIGS = {
    "clipped": LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0),
    "gspo": LossConfig(function="gspo", clip_low=0.05, clip_high=0.08),
    "cispo": LossConfig(function="cispo", clip_low=0.3, clip_high=0.2),
    "sapo": LossConfig(function="sapo"),
}


def slope(name: str, config: LossConfig, ratio: float, whole: float, advantage: float) -> float:
    """d loss / d log pi of one token, by the paper."""
    match name:
        case "clipped":
            value = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            if advantage < 0 and -value > -3.0 * advantage:
                return 0.0
            return -advantage * ratio if value == ratio * advantage else 0.0
        case "gspo":
            clip = min(max(whole, 1 - config.clip_low), 1 + config.clip_high)
            return -advantage * whole if whole * advantage <= clip * advantage else 0.0
        case "cispo":
            return -advantage * min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        case _:
            tau = 1.0 if advantage > 0 else 1.05
            p = 1 / (1 + math.exp(-tau * (ratio - 1)))
            return -advantage * 4 * p * (1 - p) * ratio


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_the_papers(name, seed):
    batch, config = inputs(seed), CONFIGS[name]
    output = RestPolicyLoss(config)(batch)
    output.loss_sum.backward()
    gradient = batch.log_probs.grad
    assert gradient is not None and batch.old_log_probs is not None and batch.token_weights is not None
    assert batch.sequence_ids is not None
    assert torch.isfinite(output.loss_sum) and (gradient[~batch.loss_mask] == 0).all()
    log_ratio = (batch.log_probs - batch.old_log_probs).detach()
    for t in batch.loss_mask.nonzero()[:, 0].tolist():
        mine = batch.loss_mask & (batch.sequence_ids == batch.sequence_ids[t])
        whole = math.exp(float(log_ratio[mine].sum()) / int(mine.sum()))
        want = slope(name, config, math.exp(float(log_ratio[t])), whole, float(batch.advantages[t]))
        want *= float(batch.token_weights[t]) / float(batch.sequence_lengths[t]) * 10 / 3
        assert float(gradient[t]) == pytest.approx(want, rel=1e-9, abs=1e-12), t


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_where_nothing_has_moved_all_are_the_policy_gradient(name):
    batch = inputs(moved=False)
    RestPolicyLoss(CONFIGS[name])(batch).loss_sum.backward()
    plain = inputs(moved=False)
    RestPolicyLoss(LossConfig())(plain).loss_sum.backward()
    torch.testing.assert_close(batch.log_probs.grad, plain.log_probs.grad, rtol=1e-12, atol=0)


def test_values_of_gspo_and_sapo():
    batch = inputs()
    assert batch.old_log_probs is not None and batch.sequence_ids is not None
    log_ratio = (batch.log_probs - batch.old_log_probs).detach()
    terms = {name: RestPolicyLoss(CONFIGS[name]).token_terms(batch) for name in ("gspo", "sapo")}
    for owner, length in zip((4, 9, 2), LENGTHS, strict=True):
        mine = batch.sequence_ids == owner
        whole = torch.exp(log_ratio[mine].sum() / length)
        torch.testing.assert_close(terms["gspo"]["ratio"][mine], whole.expand(length), rtol=1e-12, atol=0)
    mine = batch.loss_mask
    tau = torch.where(batch.advantages > 0, torch.tensor(1.0).double(), torch.tensor(1.05, dtype=torch.float64))
    want = -batch.advantages * 4 / tau * torch.sigmoid(tau * (log_ratio.exp() - 1))
    torch.testing.assert_close(terms["sapo"]["policy_loss"][mine], want[mine], rtol=1e-12, atol=0)


def test_what_a_head_may_take_apart():
    separable = {name: RestPolicyLoss(config).is_token_separable for name, config in CONFIGS.items()}
    assert separable == {"clipped": True, "gspo": False, "cispo": True, "sapo": True}
    batch = inputs()
    for name in ("cispo", "sapo"):
        loss = RestPolicyLoss(CONFIGS[name])
        rows = torch.tensor([1, 2, 7, 12])
        names = ("log_probs", "old_log_probs", "advantages", "loss_mask", "sequence_lengths", "token_weights")
        some = replace(batch, sequence_ids=None, **{n: getattr(batch, n)[rows] for n in names})
        torch.testing.assert_close(loss.token_losses(some), loss.token_losses(batch)[rows], rtol=0, atol=0)


def test_gspo_wants_whole_answers():
    batch = inputs()
    with pytest.raises(ValueError, match="needs sequence_ids"):
        RestPolicyLoss(CONFIGS["gspo"])(replace(batch, sequence_ids=None))
    cut = replace(batch, loss_mask=batch.loss_mask & (torch.arange(15) != 3))
    with pytest.raises(ValueError, match="a sequence is cut"):
        RestPolicyLoss(CONFIGS["gspo"])(cut)


def reinforce(*, scale: float = 1.0) -> RatioLoss:
    """A loss of one's own: no ratio at all."""

    def function(terms: RatioTerms) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -scale * terms.advantages * terms.log_probs, {"ratio": terms.log_ratio.detach().exp()}

    return RatioLoss(function)


HERE = "tests.algorithms.test_ratio_losses"


def test_ones_own_by_name():
    batch = inputs()
    RestPolicyLoss(LossConfig(function=f"{HERE}:reinforce", options={"scale": 2.0}))(batch).loss_sum.backward()
    assert batch.token_weights is not None and batch.log_probs.grad is not None
    want = -2.0 * batch.advantages * batch.token_weights / batch.sequence_lengths * 10 / 3
    torch.testing.assert_close(batch.log_probs.grad, torch.where(batch.loss_mask, want, 0.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"function": "ppo"}, "known are clipped, gspo, cispo, sapo; your own is package.module:attribute"),
        ({"function": "cispo", "dual_clip": 3.0}, "no such bound: set loss.dual_clip=null"),
        ({"function": "sapo", "options": {"tau": 1.0}}, "takes tau_positive, tau_negative"),
        ({"function": "sapo", "options": {"tau_positive": 0}}, "takes tau_positive, tau_negative > 0"),
        ({"function": "gspo", "options": {"tau": 1.0}}, "loss.function=gspo takes none"),
        ({"function": f"{HERE}:reinforce", "options": {"tau": 1.0}}, "takes .*scale"),
        ({"function": f"{HERE}:inputs"}, "expected megatron_rest.algorithms.RatioLoss"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        RestPolicyLoss(LossConfig(**changes))(inputs())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("loss.function=gspo", "parallel.context_parallel=2"), "context parallelism cuts: set parallel.context"),
        (("loss.function=sapo", "trainer.replay_every=5"), "loss.function=sapo cannot be computed again"),
        (("weighting.source=otb", "trainer.replay_every=5"), "weighting.source=otb cannot be computed again"),
        (("weighting.source=empg", "data.resample_zero_groups=2"), "with weighting.source=empg they do"),
        (("advantage.estimator=reinforce_pp", "data.resample_zero_groups=2"), "with advantage.estimator=reinforce_pp"),
        (("advantage.overlong_buffer=512",), "is longer than an answer may be"),
    ],
)
def test_combinations_that_cannot_work(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(load(overrides=overrides), world_size=2)
