"""The sharded log-prob and entropy operator against dense float64, on one rank and on gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.ops import TokenLogProbs, row_blocks, vocab_parallel_log_probs_and_entropy
from tests.helpers.distributed import run_distributed
from tests.helpers.reference import dense_head_gradient, dense_tokens, partition_order_tokens
from tests.ops.cases import CASE_NAMES, HeadCase, head_case
from tests.ops.collectives import count_collectives

# fp32 arithmetic on the exact storage values; bf16 storage rounds the gradient to 8 bits of mantissa.
_ABS_TOLERANCE = 1e-5
_GRADIENT_TOLERANCE = 1e-5
_BF16_GRADIENT_TOLERANCE = 2.5e-3
_FLOAT64_TOLERANCE = 1e-12


class _Hold(torch.autograd.Function):
    """Stands for the projection: hands out a non-leaf and keeps nothing that needs its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _run_case(case: HeadCase, rank: int, size: int, *, consume: bool) -> dict[str, Any]:
    """Run this rank's shard of a case; what it measured, as plain tensors."""
    group = None if size == 1 else dist.group.WORLD
    local = case.logits.shape[-1] // size
    shard = case.logits[..., rank * local : (rank + 1) * local]
    before = shard.clone()
    logits = _Hold.apply(shard.requires_grad_())
    assert logits.stride()[-1] == 1 and logits.is_contiguous() == case.logits.is_contiguous()
    with count_collectives() as forward_calls:
        tokens = vocab_parallel_log_probs_and_entropy(
            logits, case.labels, tp_group=group, consume=consume, with_collision=True, **case.options
        )
    after_forward = logits.detach().clone()
    outputs, upstream = (tokens.log_probs, tokens.entropy), (case.grad_log_probs, case.grad_entropy)
    dtype = tokens.log_probs.dtype
    with count_collectives() as backward_calls:
        (gradient,) = torch.autograd.grad(outputs, logits, [g.to(dtype) for g in upstream])
    return {
        "log_probs": tokens.log_probs.detach(),
        "entropy": tokens.entropy.detach(),
        "collision": tokens.collision,
        "gradient": gradient.clone(),
        "shares_memory": gradient.data_ptr() == logits.data_ptr(),
        "input_kept_in_forward": torch.equal(after_forward.nan_to_num(7.0), before.nan_to_num(7.0)),
        "input_kept_in_backward": torch.equal(logits.detach().nan_to_num(7.0), before.nan_to_num(7.0)),
        "forward_calls": dict(forward_calls),
        "backward_calls": dict(backward_calls),
    }


def _all_cases(rank: int, size: int) -> dict[tuple[str, bool], dict[str, Any]]:
    _run_case(head_case(CASE_NAMES[0]), rank, size, consume=False)  # a group's first call compares notes besides
    return {
        (name, consume): _run_case(head_case(name), rank, size, consume=consume)
        for name in CASE_NAMES
        for consume in (False, True)
    }


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda n: f"TP{n}")
def ranks(request: pytest.FixtureRequest) -> list[dict[tuple[str, bool], dict[str, Any]]]:
    """Every case on every rank of TP 1, 2 and 4, run once."""
    return [_all_cases(0, 1)] if request.param == 1 else run_distributed(_all_cases, request.param)


def _max_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual.double() - expected).abs().max().item() if actual.numel() else 0.0


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("consume", [False, True], ids=["keep", "consume"])
@pytest.mark.parametrize("name", CASE_NAMES)
def test_agrees_with_dense_float64(ranks: list[dict[Any, Any]], name: str, consume: bool) -> None:
    case = head_case(name)
    is_float64 = case.logits.dtype == torch.float64
    reference = dense_tokens(case.logits, case.labels, **case.options)
    logits = case.logits
    if case.nan_rows is not None:
        logits = torch.where(case.nan_rows[:, None], 0.0, case.logits)
    expected = dense_head_gradient(logits, case.labels, case.grad_log_probs, case.grad_entropy, **case.options)
    gradient = torch.cat([rank[name, consume]["gradient"] for rank in ranks], dim=-1)
    tolerance = _BF16_GRADIENT_TOLERANCE if case.is_bf16 else _GRADIENT_TOLERANCE
    assert gradient.dtype == case.logits.dtype
    assert _relative_error(gradient, expected) <= (_FLOAT64_TOLERANCE if is_float64 else tolerance)
    has_loss = slice(None) if case.nan_rows is None else ~case.nan_rows
    for rank in ranks:
        for field in ("log_probs", "entropy", "collision"):
            actual = rank[name, consume][field]
            assert actual.dtype == (torch.float64 if is_float64 else torch.float32)
            limit = _FLOAT64_TOLERANCE if is_float64 else _ABS_TOLERANCE
            assert _max_error(actual[has_loss], getattr(reference, field)[has_loss]) <= limit, field
            assert torch.equal(actual[has_loss], ranks[0][name, consume][field][has_loss]), "ranks disagree"


@pytest.mark.parametrize("name", CASE_NAMES)
def test_one_collective_forward_none_backward(ranks: list[dict[Any, Any]], name: str) -> None:
    expected = {} if len(ranks) == 1 or name == "no_tokens" else {"all_gather_single": 1}
    for rank in ranks:
        assert rank[name, False]["forward_calls"] == expected
        assert rank[name, False]["backward_calls"] == {}


@pytest.mark.parametrize("name", CASE_NAMES)
def test_the_input_is_overwritten_only_when_handed_over(ranks: list[dict[Any, Any]], name: str) -> None:
    for rank in ranks:
        kept, consumed = rank[name, False], rank[name, True]
        assert kept["input_kept_in_forward"] and kept["input_kept_in_backward"]
        assert consumed["input_kept_in_forward"]
        if name != "no_tokens":
            assert not kept["shares_memory"]
            assert consumed["shares_memory"]
        assert torch.equal(kept["gradient"], consumed["gradient"])


def test_padding_and_rows_without_loss_get_exactly_zero(ranks: list[dict[Any, Any]]) -> None:
    padded = torch.cat([rank["padding_fills_a_shard", False]["gradient"] for rank in ranks], dim=-1)
    assert torch.count_nonzero(padded[:, 700:]) == 0
    assert torch.count_nonzero(padded[:, :700]) > 0
    banned = torch.cat([rank["minus_inf_columns", False]["gradient"] for rank in ranks], dim=-1)
    assert torch.count_nonzero(banned[:, 500:]) == 0
    empty = head_case("zero_weight_rows").nan_rows
    gradient = torch.cat([rank["zero_weight_rows", False]["gradient"] for rank in ranks], dim=-1)
    assert torch.count_nonzero(gradient[empty]) == 0
    assert torch.isfinite(gradient).all()


def test_tiles_of_any_size_agree_with_dense_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows split into column tiles that divide nothing, and blocks of a few rows."""
    monkeypatch.setattr(row_blocks, "_TILE_COLUMNS", 97)
    monkeypatch.setattr(row_blocks, "_CPU_TILE_ELEMENTS", 450)
    results = [_all_cases(0, 1)]
    for name in CASE_NAMES:
        for consume in (False, True):
            test_agrees_with_dense_float64(results, name, consume)
    test_padding_and_rows_without_loss_get_exactly_zero(results)


@pytest.mark.parametrize("mask", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("entropy_gradient", [0.3, 50.0])
def test_masked_columns_get_zero_gradient_wherever_they_are(mask: float, entropy_gradient: float) -> None:
    """In the last rows and the last column tile only: the guard against them is not on the path of the others."""
    logits = torch.randn(9, 70_000, generator=torch.Generator().manual_seed(0))
    logits[7, 69_000:] = mask
    logits[8, :] = mask
    logits[8, 3] = 1.0
    labels, ones = torch.full((9,), 3), torch.ones(9)
    leaf = logits.clone().requires_grad_()
    tokens = vocab_parallel_log_probs_and_entropy(leaf, labels)
    (gradient,) = torch.autograd.grad(tokens[:2], leaf, (ones, entropy_gradient * ones))
    assert torch.count_nonzero(gradient[7, 69_000:]) == 0 and torch.count_nonzero(gradient[8]) == 0
    expected = dense_head_gradient(logits, labels, ones, entropy_gradient * ones)
    assert _relative_error(gradient, expected) <= _GRADIENT_TOLERANCE
    assert _max_error(tokens.entropy.detach(), dense_tokens(logits, labels).entropy) <= _ABS_TOLERANCE


def test_partition_order_reference(ranks: list[dict[Any, Any]]) -> None:
    """With the order of summation replicated, float64 must agree to far below 1e-8: no tolerance hides a wrong term."""
    case = head_case("float64")
    reference = partition_order_tokens(case.logits, case.labels, num_shards=len(ranks))
    for field in ("log_probs", "entropy", "collision"):
        assert _max_error(ranks[0]["float64", False][field], getattr(reference, field)) <= 1e-13, field


def test_the_references_agree_with_each_other() -> None:
    """Autograd of the dense softmax against the closed-form gradient: no test compares a formula with itself."""
    for name in ("plain", "padded", "peaked", "cold_with_offset"):
        case = head_case(name)
        logits = case.logits.double().requires_grad_()
        tokens = dense_tokens(logits, case.labels, **case.options)
        loss = (tokens.log_probs * case.grad_log_probs + tokens.entropy * case.grad_entropy).sum()
        (by_autograd,) = torch.autograd.grad(loss, logits)
        closed = dense_head_gradient(case.logits, case.labels, case.grad_log_probs, case.grad_entropy, **case.options)
        assert _relative_error(closed, by_autograd) <= 1e-12


def test_hand_computed_row() -> None:
    """Probabilities 1/2, 1/4, 1/4: everything by hand."""
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log().requires_grad_()
    tokens = vocab_parallel_log_probs_and_entropy(logits, torch.tensor([1]), with_collision=True)
    log_2 = torch.tensor(2.0).log().item()
    assert tokens.log_probs.item() == pytest.approx(-2 * log_2, abs=1e-7)
    assert tokens.entropy.item() == pytest.approx(1.5 * log_2, abs=1e-7)
    assert tokens.collision is not None and tokens.collision.item() == pytest.approx(0.375, abs=1e-7)
    (gradient,) = torch.autograd.grad(tokens.log_probs.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.75, -0.25]]), atol=1e-7, rtol=0)


def _logits(num_tokens: int = 5, vocab: int = 11) -> Tensor:
    return torch.randn(num_tokens, vocab, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("field", [0, 1], ids=["log_probs", "entropy"])
def test_one_output_alone_has_its_own_gradient(field: int) -> None:
    logits, labels = _logits().double().requires_grad_(), torch.arange(5)
    (actual,) = torch.autograd.grad(vocab_parallel_log_probs_and_entropy(logits, labels)[field].sum(), logits)
    (expected,) = torch.autograd.grad(dense_tokens(logits, labels)[field].sum(), logits)
    assert _relative_error(actual, expected) <= _FLOAT64_TOLERANCE


def test_gradcheck() -> None:
    logits, labels = _logits().double().requires_grad_(), torch.arange(5)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_log_probs_and_entropy(x, labels, temperature=0.8)[:2], (logits,)
    )


def test_twelve_bytes_saved_per_token() -> None:
    logits, labels = _logits(7).requires_grad_(), torch.arange(7)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        vocab_parallel_log_probs_and_entropy(logits, labels)
    own = [t for t in saved if t.data_ptr() not in (logits.data_ptr(), labels.data_ptr())]
    assert sum(t.untyped_storage().nbytes() for t in own) == 12 * 7


def test_retained_graph_gives_the_same_gradient_twice() -> None:
    logits, labels = _logits().requires_grad_(), torch.arange(5)
    loss = vocab_parallel_log_probs_and_entropy(logits, labels).log_probs.sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])


def test_consume_refuses_a_second_backward() -> None:
    logits, labels = _Hold.apply(_logits().requires_grad_()), torch.arange(5)
    loss = vocab_parallel_log_probs_and_entropy(logits, labels, consume=True).log_probs.sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    with pytest.raises(RuntimeError, match="second backward pass"):
        torch.autograd.grad(loss, logits)
    assert torch.equal(logits.detach(), first), "the refused pass must not write"


def test_consume_is_caught_where_another_operator_needs_the_logits() -> None:
    logits = _Hold.apply(_logits().requires_grad_())
    other = logits.square().sum()  # saved the logits for its own backward pass
    tokens = vocab_parallel_log_probs_and_entropy(logits, torch.arange(5), consume=True)
    torch.autograd.grad(tokens.log_probs.sum(), logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_double_backward_raises() -> None:
    logits = _logits().requires_grad_()
    loss = vocab_parallel_log_probs_and_entropy(logits, torch.arange(5)).entropy.sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_changed_logits_are_noticed() -> None:
    leaf = _logits().requires_grad_()
    logits = leaf * 1
    loss = vocab_parallel_log_probs_and_entropy(logits, torch.arange(5)).log_probs.sum()
    logits.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_a_result_in_place_does_not_reach_the_gradient() -> None:
    logits, labels = _logits().requires_grad_(), torch.arange(5)
    (expected,) = torch.autograd.grad(vocab_parallel_log_probs_and_entropy(logits, labels).entropy.sum(), logits)
    tokens = vocab_parallel_log_probs_and_entropy(logits, labels)
    entropy = tokens.entropy.mul_(1.0)
    entropy.detach().zero_()
    (actual,) = torch.autograd.grad(entropy, logits, torch.ones(5))
    assert torch.equal(actual, expected)


def test_no_graph_without_gradient() -> None:
    tokens: TokenLogProbs = vocab_parallel_log_probs_and_entropy(_logits(), torch.arange(5))
    assert not tokens.log_probs.requires_grad and tokens.collision is None


@pytest.mark.parametrize("label", [-100, -1, 11, 2**40])
def test_labels_out_of_range_fail(label: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 11\).*got 1 labels outside, such as"):
        vocab_parallel_log_probs_and_entropy(_logits(), torch.tensor([0, 1, label, 3, 4]))


def test_a_label_in_the_padding_is_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"\[0, 9\)"):
        vocab_parallel_log_probs_and_entropy(_logits(), torch.tensor([0, 1, 9, 3, 4]), vocab_size=9)


def test_a_row_without_a_finite_logit_is_nan_not_a_number_that_looks_fine() -> None:
    tokens = vocab_parallel_log_probs_and_entropy(torch.full((1, 4), float("-inf")), torch.tensor([0]))
    assert torch.isnan(tokens.log_probs).all() and torch.isnan(tokens.entropy).all()


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (torch.zeros(5, 11), torch.zeros(4, dtype=torch.long), {}, "labels .*same order"),
        (torch.zeros(2, 3, 11), torch.zeros(3, 2, dtype=torch.long), {}, "same order"),
        (torch.zeros(5, 11, dtype=torch.long), torch.zeros(5, dtype=torch.long), {}, "floating point"),
        (torch.zeros(5, 0), torch.zeros(5, dtype=torch.long), {}, "no columns"),
        (torch.zeros(5, 11), torch.zeros(5), {}, "int64 or int32"),
        (torch.zeros(5, 11), torch.zeros(5, dtype=torch.long), {"temperature": 0.0}, "must be positive"),
        (torch.zeros(5, 11), torch.zeros(5, dtype=torch.long), {"temperature": float("nan")}, "must be positive"),
        (torch.zeros(5, 11), torch.zeros(5, dtype=torch.long), {"vocab_size": 12}, r"1\.\.11"),
        (torch.zeros(5, 11), torch.zeros(5, dtype=torch.long), {"vocab_size": 0}, r"1\.\.11"),
        (torch.zeros(5, 11).requires_grad_(), torch.zeros(5, dtype=torch.long), {"consume": True}, "leaf"),
        (torch.zeros(1, 11).expand(5, 11), torch.zeros(5, dtype=torch.long), {"consume": True}, "expanded"),
    ],
)
def test_wrong_arguments_say_what_to_do(logits: Tensor, labels: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_parallel_log_probs_and_entropy(logits, labels, **options)
