"""FP8 gradient products: refused without the hardware, and their error bounds with the product emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rest.ops import ClippedTokenLoss, fp8, linear_log_probs_and_entropy, policy_step


def _emulated(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    """What ``torch._scaled_mm`` computes, with its demands on layout."""
    assert left.dtype == right.dtype == torch.float8_e4m3fn
    assert left.is_contiguous() and right.t().is_contiguous()
    assert left.shape[1] % 16 == 0 and right.shape[1] % 16 == 0
    assert left_scale.shape == (len(left), 1) and right_scale.shape == (1, right.shape[1])
    assert left_scale.is_contiguous() and right_scale.is_contiguous()
    return ((left.float() @ right.float()) * left_scale * right_scale).bfloat16()


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "why_not", lambda device: None)
    monkeypatch.setattr(fp8, "_multiply", _emulated)


def _head() -> tuple[Tensor, Tensor, Tensor]:
    """Rows from peaked to flat, with outlier channels, labels sampled from the policy itself."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(120, 256, generator=gen), torch.randn(4096, 256, generator=gen) * 0.06
    hidden[:, ::97] *= 8
    hidden = (hidden * (torch.rand(120, 1, generator=gen) * 3 + 0.15)).bfloat16()
    p = torch.softmax(hidden.float() @ weight.bfloat16().float().t(), -1)
    return hidden, weight.bfloat16(), torch.multinomial(p, 1, generator=gen)[:, 0]


def _run(operator: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels = _head()
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    gen = torch.Generator().manual_seed(1)
    g, ones = torch.randn(120, generator=gen), torch.ones(120)
    if operator == "recompute":
        tokens = linear_log_probs_and_entropy(x, w, labels, block_size=50, **options)
        log_probs = tokens.log_probs
        loss = (g * tokens.log_probs + 0.01 * tokens.entropy).sum()
    else:
        wide_clip = {"clip_low": 0.9, "clip_high": 100.0}
        token_loss = ClippedTokenLoss(
            old_log_probs=-2 * ones, advantages=g, weights=ones, entropy_weights=0.01 * ones, **wide_clip
        )
        step = policy_step(x, w, labels, token_loss, block_size=50, **options)
        log_probs, loss = step.log_probs, step.loss_sum
    loss.backward()
    assert x.grad is not None and w.grad is not None
    return log_probs.detach(), x.grad.double(), w.grad.double()


@pytest.mark.parametrize("operator", ["recompute", "policy_step"])
def test_gradients_keep_their_direction_and_log_probs_their_bits(emulation: None, operator: str) -> None:
    log_probs, *expected = _run(operator)
    fp8_log_probs, *actual = _run(operator, fp8_gradients=True)
    assert torch.equal(log_probs, fp8_log_probs)
    for name, gradient, reference in zip(("d_hidden", "d_weight"), actual, expected, strict=True):
        cosine = (gradient * reference).sum() / gradient.norm() / reference.norm()
        assert cosine >= 0.999, (name, cosine)
        error = ((gradient - reference).norm() / reference.norm()).item()
        assert 1e-3 < error <= 4e-2, (name, error)  # and FP8 really was used


def test_the_emulation_is_what_torch_computes() -> None:
    """On CPU, where torch has the same product: arguments and layouts are the ones it takes."""
    gen = torch.Generator().manual_seed(0)
    left, left_scale = fp8.quantise(torch.randn(32, 64, generator=gen), 1)
    right, right_scale = fp8.quantise(torch.randn(64, 48, generator=gen), 0)
    operands = (left, right.t().contiguous().t(), left_scale, right_scale)
    try:
        actual = fp8._multiply(*operands)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no FP8 product with row-wise scales on CPU: {error}")
    torch.testing.assert_close(actual.float(), _emulated(*operands).float(), rtol=1e-2, atol=1e-2)


def test_rows_without_gradient_stay_zero(emulation: None) -> None:
    products = fp8.Fp8Products(torch.ones(32, 16, dtype=torch.bfloat16))
    assert torch.count_nonzero(products.hidden_gradient(torch.zeros(3, 32))) == 0
    total = torch.zeros(32, 16)
    products.accumulate_weight_gradient(torch.zeros(3, 32), torch.zeros(3, 16, dtype=torch.bfloat16), total)
    assert torch.count_nonzero(total) == 0


def test_quantise_uses_the_range_of_every_row() -> None:
    values = torch.tensor([[1.0, -2.0, 0.5], [1e-6, 2e-6, 0.0], [0.0, 0.0, 0.0]])
    quantised, scale = fp8.quantise(values, 1)
    assert quantised.float().abs().amax(1).tolist() == [448.0, 448.0, 0.0]
    torch.testing.assert_close(quantised.float() * scale, values, rtol=2**-4, atol=0)


def test_refused_where_the_hardware_or_the_shapes_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = _head()
    with pytest.raises(RuntimeError, match=r"fp8_gradients=True cannot run here: .*on cpu.*9\.0 \(H100\)"):
        linear_log_probs_and_entropy(hidden, weight, labels, fp8_gradients=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot run here"):
        linear_log_probs_and_entropy(hidden, weight, labels, fp8_gradients=True)
    monkeypatch.setattr(fp8, "why_not", lambda device: None)
    for wrong in (weight.float(), weight[:4090], weight[:, :250]):
        with pytest.raises(ValueError, match="multiples of 16"):
            fp8.Fp8Products.check(wrong)
