"""The policy head on CUDA tensors (Triton row kernels, fp32 output of bf16 products) against dense float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rest.ops import (
    ClippedTokenLoss,
    fp8,
    linear_log_probs_and_entropy,
    policy_step,
    vocab_parallel_log_probs_and_entropy,
)
from tests.helpers.reference import dense_head_gradient, dense_tokens
from tests.ops.cases import CASE_NAMES, head_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device"),
]


@pytest.fixture
def no_host_sync():  # type: ignore[no-untyped-def]
    """Any host synchronisation inside the test is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("consume", [False, True], ids=["keep", "consume"])
@pytest.mark.parametrize("name", CASE_NAMES)
def test_logits_agree_with_dense_float64(name: str, consume: bool) -> None:
    case = head_case(name)
    leaf = case.logits.cuda().requires_grad_()
    logits = leaf.clone()
    tokens = vocab_parallel_log_probs_and_entropy(
        logits, case.labels.cuda(), consume=consume, with_collision=True, **case.options
    )
    upstream = [g.cuda().to(tokens.log_probs.dtype) for g in (case.grad_log_probs, case.grad_entropy)]
    (gradient,) = torch.autograd.grad(tokens[:2], logits, upstream)
    reference = dense_tokens(case.logits, case.labels, **case.options)
    clean = case.logits if case.nan_rows is None else torch.where(case.nan_rows[:, None], 0.0, case.logits)
    expected = dense_head_gradient(clean, case.labels, case.grad_log_probs, case.grad_entropy, **case.options)
    has_loss = slice(None) if case.nan_rows is None else ~case.nan_rows
    for actual, dense in zip(tokens, reference, strict=True):
        torch.testing.assert_close(actual.detach().cpu().double()[has_loss], dense[has_loss], atol=1e-5, rtol=0)
    error = (gradient.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= (2.5e-3 if case.is_bf16 else 1e-5)


def test_bf16_head_from_hidden_states() -> None:
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=gen).bfloat16()
    weight = (torch.randn(5000, 256, generator=gen) * 0.2).bfloat16()
    labels = torch.randint(0, 5000, (300,), generator=gen)
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    dense = dense_tokens(x @ w.t(), labels)
    expected = torch.autograd.grad((dense.log_probs + 0.1 * dense.entropy).sum(), (x, w))
    x, w = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()
    tokens = linear_log_probs_and_entropy(x, w, labels.cuda(), block_size=128)
    torch.testing.assert_close(tokens.log_probs.detach().cpu().double(), dense.log_probs.detach(), atol=1e-5, rtol=0)
    actual = torch.autograd.grad((tokens.log_probs + 0.1 * tokens.entropy).sum(), (x, w))
    for gradient, reference in zip(actual, expected, strict=True):
        assert (gradient.cpu().double() - reference).norm() / reference.norm() <= 2.5e-3


@pytest.mark.parametrize("rows", [64, 61])
def test_fp8_gradients_keep_their_direction(rows: int) -> None:
    obstacle = fp8.why_not(torch.device("cuda"))
    if obstacle is not None:
        pytest.skip(obstacle)
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 256, generator=gen).bfloat16().cuda()
    weight = (torch.randn(4096, 256, generator=gen) * 0.1).bfloat16().cuda()
    labels = torch.randint(0, 4096, (rows,), generator=gen).cuda()
    results = []
    for flag in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        tokens = linear_log_probs_and_entropy(x, w, labels, block_size=40, fp8_gradients=flag)
        gradients = torch.autograd.grad((tokens.log_probs + 0.01 * tokens.entropy).sum(), (x, w))
        results.append((tokens.log_probs.detach(), *(gradient.double() for gradient in gradients)))
    assert torch.equal(results[0][0], results[1][0])
    for exact, rounded in zip(results[0][1:], results[1][1:], strict=True):
        assert (exact * rounded).sum() / exact.norm() / rounded.norm() >= 0.999


def _cuda_head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ClippedTokenLoss]:
    hidden = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 1024, (64,), device="cuda")
    ones = torch.ones(64, device="cuda")
    loss = ClippedTokenLoss(old_log_probs=-7 * ones, advantages=ones, weights=ones, entropy_weights=0.1 * ones)
    return hidden, weight, labels, replace(loss, dual_clip=3.0)


def test_the_hot_path_never_waits_for_the_device(no_host_sync: None) -> None:
    hidden, weight, labels, loss = _cuda_head()
    vocab_parallel_log_probs_and_entropy(hidden @ weight.t(), labels, consume=True).log_probs.sum().backward()
    linear_log_probs_and_entropy(hidden, weight, labels).entropy.sum().backward()
    policy_step(hidden, weight, labels, loss).loss_sum.backward()
    rows = torch.arange(0, 64, 3)  # on the CPU, as packing leaves them
    policy_step(hidden, weight, labels, loss, active_rows=rows).loss_sum.backward()
    assert hidden.grad is not None and weight.grad is not None
