"""The heads that start from hidden states against dense float64: recompute form and gradient-in-forward form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.ops import (
    ClippedTokenLoss,
    TokenLogProbs,
    linear_log_probs_and_entropy,
    policy_step,
    vocab_parallel_log_probs_and_entropy,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.reference import dense_tokens
from tests.ops.collectives import count_collectives

_ABS_TOLERANCE = 1e-5  # log-probs and entropy, nats, against float64 of the same operands, bf16 operands included
_GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.5e-3}
# reduce_in_fp32=False: ranks round their parts of d_hidden to bf16 and add in bf16, half the traffic, more roundings.
_REDUCED_BF16_TOLERANCE = 5e-3
_CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5}


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A head of 96 vocabulary rows on 48 tokens; everything below is built from the same seed on every rank."""

    shape: tuple[int, ...] = (48,)
    dtype: torch.dtype = torch.float32
    vocab_size: int | None = None
    temperature: float = 1.0
    active: tuple[int, ...] | None = None
    block_size: int | None = 13
    sequence_parallel: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        gen = torch.Generator().manual_seed(3)
        hidden = torch.randn(*self.shape, 24, generator=gen).to(self.dtype)
        weight = (torch.randn(96, 24, generator=gen) * 0.6).to(self.dtype)
        if self.vocab_size is not None:
            weight[self.vocab_size :] = 30.0  # padding that would take every row over
        labels = torch.randint(0, self.vocab_size or 96, self.shape, generator=gen)
        n = labels.numel()
        rows = {name: torch.randn(n, generator=gen) for name in ("g", "h", "advantages", "noise")}
        weights = torch.rand(n, generator=gen) * 2
        weights[torch.arange(n) % 5 == 0] = 0.0
        return {"hidden": hidden, "weight": weight, "labels": labels, "weights": weights, **rows}

    def rows(self) -> Tensor:
        return torch.arange(48) if self.active is None else torch.tensor(self.active, dtype=torch.int64)


_CASES = {
    "all_rows": _Case(),
    "one_block": _Case(block_size=None),
    "float64": _Case(dtype=torch.float64),
    "bf16": _Case(dtype=torch.bfloat16),
    "bf16_active": _Case(dtype=torch.bfloat16, active=tuple(range(1, 48, 5))),
    "bf16_reduced_in_bf16": _Case(dtype=torch.bfloat16, options={"reduce_in_fp32": False}),
    "padded": _Case(vocab_size=70),  # at TP 4 the last shard is padding only
    "temperature": _Case(temperature=0.7),
    "sequence_batch": _Case(shape=(12, 4)),
    "active_fifth": _Case(active=tuple(range(2, 48, 5)), block_size=4),
    "active_in_one_shard": _Case(active=(37, 38, 40, 46)),
    "active_sequence_batch": _Case(shape=(12, 4), active=(0, 5, 6, 7, 21, 47)),
    "nothing_active": _Case(active=()),
}
_CASES |= {f"sp_{name}": replace(case, sequence_parallel=True) for name, case in _CASES.items()}


def _shards(case: _Case, data: dict[str, Tensor], rank: int, size: int) -> tuple[Tensor, Tensor]:
    hidden = data["hidden"].chunk(size)[rank] if case.sequence_parallel else data["hidden"]
    weight = data["weight"].chunk(size)[rank]
    return hidden.clone().requires_grad_(), weight.clone().requires_grad_()


def _options(case: _Case, size: int) -> dict[str, Any]:
    return {
        "tp_group": None if size == 1 else dist.group.WORLD,
        "temperature": case.temperature,
        "vocab_size": case.vocab_size,
        "sequence_parallel": case.sequence_parallel,
        "active_rows": None if case.active is None else case.rows(),
        "block_size": case.block_size,
        **case.options,
    }


def _token_loss(data: dict[str, Tensor], *, with_entropy: bool = True) -> ClippedTokenLoss:
    return ClippedTokenLoss(
        old_log_probs=-4.0 + 2 * data["noise"],
        advantages=data["advantages"],
        weights=data["weights"],
        entropy_weights=0.3 * data["weights"].clamp(max=1.0) if with_entropy else None,
        **_CLIP,
    )


def _run_recompute(case: _Case, rank: int, size: int) -> dict[str, Any]:
    data = case.tensors()
    hidden, weight = _shards(case, data, rank, size)
    with count_collectives() as forward_calls:
        tokens = linear_log_probs_and_entropy(
            hidden, weight, data["labels"], with_collision=True, **_options(case, size)
        )
    upstream = [data[name].view(case.shape).to(tokens.log_probs.dtype) for name in ("g", "h")]
    with count_collectives() as backward_calls:
        torch.autograd.backward(tokens[:2], upstream)
    return {
        "log_probs": tokens.log_probs.detach(),
        "entropy": tokens.entropy.detach(),
        "collision": tokens.collision,
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
        "forward_calls": dict(forward_calls),
        "backward_calls": dict(backward_calls),
    }


def _run_step(case: _Case, rank: int, size: int) -> dict[str, Any]:
    data = case.tensors()
    hidden, weight = _shards(case, data, rank, size)
    with count_collectives() as forward_calls:
        step = policy_step(hidden, weight, data["labels"], _token_loss(data), **_options(case, size))
    with count_collectives() as backward_calls:
        (step.loss_sum * 0.25).backward()
    return {
        "loss_sum": step.loss_sum.detach(),
        "log_probs": step.log_probs,
        "entropy": step.entropy,
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
        "forward_calls": dict(forward_calls),
        "backward_calls": dict(backward_calls),
        "payload": forward_calls.payload,
    }


def _all_cases(rank: int, size: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    _run_recompute(_Case(), rank, size)  # a group's first call compares notes besides
    return {name: (_run_recompute(case, rank, size), _run_step(case, rank, size)) for name, case in _CASES.items()}


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda n: f"TP{n}")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return [_all_cases(0, 1)] if request.param == 1 else run_distributed(_all_cases, request.param)


def _dense(case: _Case) -> tuple[dict[str, Tensor], Tensor, Tensor, TokenLogProbs]:
    """Data, float64 leaves and the dense tokens of the active rows, flattened."""
    data = case.tensors()
    hidden, weight = data["hidden"].double().requires_grad_(), data["weight"].double().requires_grad_()
    logits = hidden.reshape(-1, 24)[case.rows()] @ weight.t()
    tokens = dense_tokens(
        logits, data["labels"].reshape(-1)[case.rows()], temperature=case.temperature, vocab_size=case.vocab_size
    )
    return data, hidden, weight, TokenLogProbs(*tokens)


def _spread(case: _Case, values: Tensor) -> Tensor:
    out = torch.zeros(48, dtype=torch.float64)
    out[case.rows()] = values.detach()
    return out.view(case.shape)


def _check_gradients(case: _Case, ranks: list[dict[str, Any]], grad_hidden: Tensor, grad_weight: Tensor) -> None:
    limit = _GRADIENT_TOLERANCE[case.dtype]
    is_reduced = case.dtype == torch.bfloat16 and len(ranks) > 1 and not case.options.get("reduce_in_fp32", True)
    weight = torch.cat([rank["grad_weight"] for rank in ranks])
    whole = torch.cat([rank["grad_hidden"] for rank in ranks])
    for hidden in [whole] if case.sequence_parallel else [rank["grad_hidden"] for rank in ranks]:
        _check_gradient(hidden, grad_hidden, _REDUCED_BF16_TOLERANCE if is_reduced else limit)
    _check_gradient(weight, grad_weight, limit)
    if case.vocab_size is not None:
        assert torch.count_nonzero(weight[case.vocab_size :]) == 0
    idle = torch.ones(48, dtype=torch.bool)
    idle[case.rows()] = False
    assert torch.count_nonzero((whole if case.sequence_parallel else hidden).reshape(-1, 24)[idle]) == 0


def _check_gradient(actual: Tensor, expected: Tensor, limit: float) -> None:
    assert actual.shape == expected.shape
    if expected.count_nonzero() == 0:
        assert torch.count_nonzero(actual) == 0
    else:
        assert ((actual.double() - expected).norm() / expected.norm()).item() <= limit


@pytest.mark.parametrize("name", _CASES)
def test_recompute_form_agrees_with_dense_float64(ranks: list[dict[str, Any]], name: str) -> None:
    case = _CASES[name]
    data, hidden, weight, tokens = _dense(case)
    active = case.rows()
    loss = (data["g"][active] * tokens.log_probs + data["h"][active] * tokens.entropy).sum()
    expected = torch.autograd.grad(loss, (hidden, weight))
    results = [rank[name][0] for rank in ranks]
    for result in results:
        for key in ("log_probs", "entropy", "collision"):
            assert result[key].dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(
                result[key].double(), _spread(case, getattr(tokens, key)), atol=_ABS_TOLERANCE, rtol=0
            )
            assert torch.equal(result[key], results[0][key]), "ranks disagree"
    _check_gradients(case, results, *expected)


@pytest.mark.parametrize("name", _CASES)
def test_policy_step_agrees_with_dense_float64(ranks: list[dict[str, Any]], name: str) -> None:
    """The loss is written here in plain torch and differentiated by autograd, clipping and dual clip included."""
    case = _CASES[name]
    data, hidden, weight, tokens = _dense(case)
    constants = _token_loss(data)
    advantages, weights, old_log_probs, entropy_weights = (
        getattr(constants, key)[case.rows()].double()
        for key in ("advantages", "weights", "old_log_probs", "entropy_weights")
    )
    ratio = (tokens.log_probs - old_log_probs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    surrogate = torch.where(advantages < 0, torch.maximum(surrogate, 1.5 * advantages), surrogate)
    loss = -(weights * surrogate).sum() - (entropy_weights * tokens.entropy).sum()
    expected = torch.autograd.grad(0.25 * loss, (hidden, weight))
    results = [rank[name][1] for rank in ranks]
    for result in results:
        torch.testing.assert_close(result["loss_sum"].double(), loss.detach(), atol=2e-4, rtol=1e-5)
        torch.testing.assert_close(
            result["log_probs"].double(), _spread(case, tokens.log_probs), atol=_ABS_TOLERANCE, rtol=0
        )
        assert torch.equal(result["loss_sum"], results[0]["loss_sum"])
    _check_gradients(case, results, *expected)


def test_the_cases_reach_every_branch_of_the_loss() -> None:
    """Clipped on both sides, dual clip and unclipped rows all occur, so agreement above means something."""
    data, _, _, tokens = _dense(_CASES["all_rows"])
    ratio = (tokens.log_probs.detach() - (-4.0 + 2 * data["noise"])).exp()
    positive = data["advantages"] > 0
    has_loss = data["weights"] > 0
    for branch in (
        positive & (ratio > 1.28), positive & (ratio < 1.28), ~positive & (ratio < 0.8), ~positive & (ratio > 1.5),
        ~positive & (ratio > 0.8) & (ratio < 1.5),
    ):  # fmt: skip
        assert (branch & has_loss).any()


@pytest.mark.parametrize("name", _CASES)
def test_number_of_collectives(ranks: list[dict[str, Any]], name: str) -> None:
    """One all-gather of statistics a sweep (recompute) or a block (policy step), and one collective a way for rows."""
    case = _CASES[name]
    num_active = len(case.rows())
    num_blocks = -(-num_active // (case.block_size or num_active or 1))
    joined = len(ranks) > 1 and num_active > 0
    rows_in = int(joined and case.sequence_parallel)
    give_back = {"reduce_scatter_single" if case.sequence_parallel else "all_reduce": 1} if joined else {}
    for rank in ranks:
        recompute, step = rank[name]
        assert recompute["forward_calls"] == ({"all_gather_single": 1 + rows_in} if joined else {})
        assert recompute["backward_calls"] == {**({"all_gather_single": 1} if rows_in else {}), **give_back}
        expected = {"all_gather_single": num_blocks + rows_in, **give_back} if joined else {}
        assert step["forward_calls"] == expected
        assert step["backward_calls"] == {}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_bytes_of_the_hidden_gradient(ranks: list[dict[str, Any]], sequence_parallel: bool) -> None:
    """bf16 hidden states: 4 bytes an element where the ranks' parts are added in fp32, 2 where they are not."""
    prefix, collective = ("sp_", "reduce_scatter_single") if sequence_parallel else ("", "all_reduce")
    for rank in ranks:
        for name, width in (("bf16", 4), ("bf16_reduced_in_bf16", 2)):
            expected = width * 48 * 24 if len(ranks) > 1 else 0
            assert rank[prefix + name][1]["payload"][collective] == expected
        fifth = rank[prefix + "bf16_active"][1]["payload"][collective]  # 10 active rows; at TP 4 a rank has 3 at most
        assert fifth <= 4 * 24 * 12


def _unsharded() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    data = _Case().tensors()
    return data, data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()


def test_a_fifth_of_the_rows_equals_all_rows_with_zero_weight() -> None:
    data = _Case().tensors()
    active = torch.arange(2, 48, 5)
    mask = torch.zeros(48).index_fill_(0, active, 1.0)
    results = []
    for rows in (None, active):
        hidden, weight = data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
        loss = _token_loss(data)
        loss = replace(loss, weights=loss.weights * mask, entropy_weights=loss.entropy_weights * mask)
        step = policy_step(hidden, weight, data["labels"], loss, active_rows=rows)
        step.loss_sum.backward()
        results.append((step.loss_sum.detach(), hidden.grad, weight.grad))
    for full, compact in zip(*results, strict=True):
        torch.testing.assert_close(compact, full, atol=1e-5, rtol=1e-5)
    assert torch.count_nonzero(results[1][1].abs().sum(1)) <= len(active)


def test_rows_that_are_not_projected_may_hold_nan() -> None:
    data, _, weight = _unsharded()
    active = torch.arange(2, 48, 5)
    dirty = torch.full_like(data["hidden"], float("nan"))
    dirty[active] = data["hidden"][active]
    for hidden in (data["hidden"].clone().requires_grad_(), dirty.requires_grad_()):
        weight.grad = None
        tokens = linear_log_probs_and_entropy(hidden, weight, data["labels"], active_rows=active)
        (tokens.log_probs.sum() + tokens.entropy.sum()).backward()
        assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    assert torch.isfinite(tokens.log_probs).all()


def test_masked_tokens_of_the_loss_may_hold_nan() -> None:
    data, hidden, weight = _unsharded()
    loss = _token_loss(data)
    empty = loss.weights == 0
    loss.old_log_probs[empty] = float("nan")
    loss.advantages[empty] = float("nan")
    step = policy_step(hidden, weight, data["labels"], loss)
    step.loss_sum.backward()
    assert torch.isfinite(step.loss_sum) and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_the_result_does_not_depend_on_the_block_size() -> None:
    """Rows are independent: a block of any size gives every row the same sum over the vocabulary."""
    data = _Case().tensors()
    results = [
        linear_log_probs_and_entropy(data["hidden"], data["weight"], data["labels"], block_size=size)
        for size in (1, 7, 48, 1000)
    ]
    for result in results:
        torch.testing.assert_close(result.log_probs, results[0].log_probs, atol=2e-6, rtol=0)
        torch.testing.assert_close(result.entropy, results[0].entropy, atol=2e-6, rtol=0)


def test_tied_weights_add_both_gradients() -> None:
    data = _Case(dtype=torch.float64).tensors()
    gradients = []
    for is_dense in (False, True):
        weight = data["weight"].clone().requires_grad_()
        hidden = torch.tanh(weight[data["labels"].roll(1)])  # the embedding of the token before
        if is_dense:
            tokens = TokenLogProbs(*dense_tokens(hidden @ weight.t(), data["labels"]))
        else:
            tokens = linear_log_probs_and_entropy(hidden, weight, data["labels"], block_size=13)
        (data["g"] * tokens.log_probs + data["h"] * tokens.entropy).sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_bf16_logits_are_not_rounded() -> None:
    """What the fused form is for: the materialised bf16 path is off by far more than the fused one."""
    gen = torch.Generator().manual_seed(5)
    hidden = (torch.randn(64, 256, generator=gen) * 2).bfloat16()
    weight = (torch.randn(512, 256, generator=gen) * 0.3).bfloat16()
    labels = torch.randint(0, 512, (64,), generator=gen)
    reference = dense_tokens(hidden.double() @ weight.double().t(), labels).log_probs
    fused = linear_log_probs_and_entropy(hidden, weight, labels).log_probs
    materialised = vocab_parallel_log_probs_and_entropy(hidden @ weight.t(), labels).log_probs
    assert (fused - reference).abs().max() <= 1e-5
    assert (materialised - reference).abs().max() >= 1e-2


@pytest.mark.parametrize("form", ["recompute", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_accumulation_fusion(form: str, dtype: torch.dtype) -> None:
    """Megatron's contract: main_grad accumulates in fp32, the flag is set, autograd gets zeros for its hooks."""
    data = _Case(dtype=dtype).tensors()
    loss, gradients = _token_loss(data), {}
    for fused in (False, True):
        hidden, weight = data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
        weight.main_grad = torch.full(weight.shape, 2.0)
        weight.grad_added_to_main_grad = False
        if form == "recompute":
            tokens = linear_log_probs_and_entropy(
                hidden, weight, data["labels"], block_size=13, gradient_accumulation_fusion=fused
            )
            total = loss(tokens.log_probs, tokens.entropy, slice(None)).sum()
        else:
            total = policy_step(
                hidden, weight, data["labels"], loss, block_size=13, main_grad_scale=0.5 if fused else None
            ).loss_sum
        (0.5 * total).backward()
        gradients[fused] = (weight.main_grad - 2.0 if fused else weight.grad.float(), hidden.grad.float())
        assert weight.grad_added_to_main_grad is fused
        if fused:
            assert torch.count_nonzero(weight.grad) == 0
        else:
            assert torch.equal(weight.main_grad, torch.full(weight.shape, 2.0))
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    for plain, fused_gradient in zip(gradients[False], gradients[True], strict=True):
        assert (fused_gradient - plain).norm() <= limit * plain.norm()


def test_without_the_flag_no_gradient_reaches_autograd() -> None:
    data, hidden, weight = _unsharded()
    weight.main_grad = torch.zeros(weight.shape)
    tokens = linear_log_probs_and_entropy(hidden, weight, data["labels"], gradient_accumulation_fusion=True)
    tokens.log_probs.sum().backward()
    assert weight.grad is None and torch.count_nonzero(weight.main_grad) > 0


def test_a_broken_promise_about_the_loss_scale_raises() -> None:
    data, hidden, weight = _unsharded()
    weight.main_grad = torch.zeros(weight.shape)
    step = policy_step(hidden, weight, data["labels"], _token_loss(data), main_grad_scale=0.5)
    with pytest.raises(RuntimeError, match=r"main_grad_scale=0\.5.*got 1\.0"):
        step.loss_sum.backward()


def test_scoring_keeps_nothing_and_touches_no_main_grad() -> None:
    data, hidden, weight = _unsharded()
    weight.main_grad = torch.zeros(weight.shape)
    expected = linear_log_probs_and_entropy(hidden, weight, data["labels"])
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scored = linear_log_probs_and_entropy(hidden, weight, data["labels"], gradient_accumulation_fusion=True)
        step = policy_step(hidden, weight, data["labels"], _token_loss(data), main_grad_scale=1.0)
    assert saved == [] and not scored.log_probs.requires_grad and not step.loss_sum.requires_grad
    assert torch.equal(scored.log_probs, expected.log_probs.detach())
    torch.testing.assert_close(step.log_probs, scored.log_probs, atol=2e-6, rtol=0)
    assert torch.count_nonzero(weight.main_grad) == 0


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(frozen: str) -> None:
    data, hidden, weight = _unsharded()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    for loss in (
        linear_log_probs_and_entropy(hidden, weight, data["labels"]).entropy.sum(),
        policy_step(hidden, weight, data["labels"], _token_loss(data)).loss_sum,
    ):
        hidden.grad = weight.grad = None
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")


def test_backward_twice() -> None:
    data, hidden, weight = _unsharded()
    loss = linear_log_probs_and_entropy(hidden, weight, data["labels"]).log_probs.sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    step = policy_step(hidden, weight, data["labels"], _token_loss(data))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(step.loss_sum, hidden, create_graph=True)
    torch.autograd.grad(step.loss_sum, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        torch.autograd.grad(step.loss_sum, hidden)


def test_a_loss_without_entropy_differentiates_none() -> None:
    data, hidden, weight = _unsharded()
    loss = _token_loss(data, with_entropy=False)
    policy_step(hidden, weight, data["labels"], loss).loss_sum.backward()
    first, hidden.grad = hidden.grad, None
    tokens = linear_log_probs_and_entropy(hidden, weight, data["labels"])
    loss(tokens.log_probs, tokens.entropy, slice(None)).sum().backward()
    torch.testing.assert_close(first, hidden.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(24, 96)}, "not transposed"),
        ({"weight": torch.zeros(96, 24, dtype=torch.bfloat16)}, "share a floating dtype"),
        ({"labels": torch.zeros(47, dtype=torch.long)}, "whole sequence"),
        ({"labels": torch.full((48,), 96)}, r"\[0, 96\)"),
        ({"labels": torch.zeros(48)}, "int64 or int32"),
        ({"temperature": -1.0}, "must be positive"),
        ({"vocab_size": 97}, r"1\.\.96"),
        ({"block_size": 0}, "at least 1 row"),
        ({"active_rows": torch.tensor([3, 2])}, "strictly increasing"),
        ({"active_rows": torch.tensor([3, 48])}, "strictly increasing"),
        ({"active_rows": torch.tensor([-1, 3])}, "strictly increasing"),
        ({"active_rows": torch.tensor([True, False])}, "int64 tensor on the CPU"),
        ({"gradient_accumulation_fusion": True}, "main_grad is missing"),
    ],
)
def test_wrong_arguments_say_what_to_do(change: dict[str, Any], message: str) -> None:
    data = _Case().tensors()
    arguments: dict[str, Any] = {name: data[name] for name in ("hidden", "weight", "labels")} | change
    with pytest.raises(ValueError, match=message):
        linear_log_probs_and_entropy(**arguments)


def test_labels_of_rows_that_are_not_projected_are_not_looked_at() -> None:
    data, hidden, weight = _unsharded()
    labels = data["labels"].clone()
    labels[0] = -100
    tokens = linear_log_probs_and_entropy(hidden, weight, labels, active_rows=torch.arange(1, 48))
    assert tokens.log_probs[0] == 0 and torch.count_nonzero(tokens.log_probs) == 47


def test_a_bf16_main_grad_is_refused() -> None:
    data, hidden, weight = _unsharded()
    weight.main_grad = torch.zeros(weight.shape, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be torch\.float32"):
        policy_step(hidden, weight, data["labels"], _token_loss(data), main_grad_scale=1.0)


def test_a_loss_that_is_already_summed_is_refused() -> None:
    data, hidden, weight = _unsharded()
    with pytest.raises(ValueError, match="one loss a row"):
        policy_step(hidden, weight, data["labels"], lambda log_probs, entropy, rows: log_probs.sum())
