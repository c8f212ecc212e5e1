"""Inputs that broke published policy heads, as data: one entry a case, built the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["CASE_NAMES", "HeadCase", "head_case"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadCase:
    """Whole-vocabulary logits ``[..., V]`` with labels, upstream gradients and the operator's keyword arguments."""

    logits: Tensor
    labels: Tensor
    grad_log_probs: Tensor
    grad_entropy: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # temperature, vocab_size
    nan_rows: Tensor | None = None  # rows with zero upstream gradient whose logits are NaN

    @property
    def is_bf16(self) -> bool:
        return self.logits.dtype == torch.bfloat16


def _base(num_tokens: int = 23, vocab: int = 1000, seed: int = 0) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)
    return {
        "logits": torch.randn(num_tokens, vocab, generator=gen) * 4,
        "labels": torch.randint(0, vocab, (num_tokens,), generator=gen),
        "grad_log_probs": torch.randn(num_tokens, generator=gen),
        "grad_entropy": torch.randn(num_tokens, generator=gen),
    }


def _plain() -> dict[str, Any]:
    return _base()


def _odd_vocabulary() -> dict[str, Any]:
    return _base(vocab=4 * 251)  # 251 is prime: no tile divides a shard


def _float64() -> dict[str, Any]:
    case = _base()
    return {**case, "logits": case["logits"].double()}


def _bf16() -> dict[str, Any]:
    case = _base()
    return {**case, "logits": case["logits"].bfloat16()}


def _padded() -> dict[str, Any]:
    """Padding reads +50 where it is not masked away: it would take over every sum."""
    case = _base(vocab=1024)
    case["logits"][:, 1001:] = 50.0
    return {**case, "labels": case["labels"] % 1001, "options": {"vocab_size": 1001}}


def _padding_fills_a_shard() -> dict[str, Any]:
    case = _base(vocab=1024)
    case["logits"][:, 700:] = float("nan")  # at TP 4 the last shard starts at 768
    return {**case, "labels": case["labels"] % 700, "options": {"vocab_size": 700}}


def _minus_inf_columns() -> dict[str, Any]:
    """A third of the columns and, at TP 2 and 4, a whole shard cannot be sampled."""
    case = _base()
    banned = (torch.arange(1000) % 3 == 0) | (torch.arange(1000) >= 500)
    case["logits"][:, banned] = float("-inf")
    return {**case, "labels": (case["labels"] % 166) * 3 + 1}


def _all_negative() -> dict[str, Any]:
    case = _base()
    return {**case, "logits": case["logits"] - 120.0}


def _offset_1000() -> dict[str, Any]:
    case = _base()
    return {**case, "logits": case["logits"] + 1000.0}


def _shard_borders() -> dict[str, Any]:
    labels = torch.tensor([0, 249, 250, 251, 499, 500, 501, 749, 750, 751, 998, 999] * 2)[:23]
    return {**_base(), "labels": labels}


def _last_shard() -> dict[str, Any]:
    case = _base()
    return {**case, "labels": 750 + case["labels"] % 250}


def _peaked() -> dict[str, Any]:
    """Entropy near zero: the label or another column holds nearly all of the probability."""
    case = _base()
    case["logits"][torch.arange(23), (case["labels"] + torch.arange(23) % 2) % 1000] += 40.0
    return case


def _hot() -> dict[str, Any]:
    return {**_base(), "options": {"temperature": 1.7}}


def _cold_with_offset() -> dict[str, Any]:
    case = _base()
    return {**case, "logits": case["logits"] + 1000.0, "options": {"temperature": 0.6}}


def _no_tokens() -> dict[str, Any]:
    return _base(num_tokens=0)


def _one_token() -> dict[str, Any]:
    return _base(num_tokens=1)


def _sequence_batch() -> dict[str, Any]:
    case = _base(num_tokens=24)
    return {name: value.unflatten(0, (6, 4)) for name, value in case.items()}


def _transposed() -> dict[str, Any]:
    """[b, s, V] seen as [s, b, V]: strides without a two-dimensional view."""
    case = _base(num_tokens=24)
    return {name: value.unflatten(0, (6, 4)).transpose(0, 1) for name, value in case.items()}


def _expanded_gradients() -> dict[str, Any]:
    case = _base()
    return {**case, "grad_log_probs": torch.ones(()).expand(23), "grad_entropy": torch.tensor(-0.5).expand(23)}


def _strided_gradients() -> dict[str, Any]:
    case = _base()
    return {
        **case,
        "grad_log_probs": case["grad_log_probs"].repeat_interleave(2)[::2],
        "grad_entropy": case["grad_entropy"].repeat_interleave(3)[::3],
    }


def _zero_weight_rows() -> dict[str, Any]:
    """Rows that carry no loss hold NaN, as padding may: not even their gradient may become NaN."""
    case = _base()
    empty = torch.arange(23) % 3 == 0
    case["logits"][empty] = float("nan")
    case["grad_log_probs"][empty] = 0.0
    case["grad_entropy"][empty] = 0.0
    return {**case, "nan_rows": empty}


def _int32_labels() -> dict[str, Any]:
    case = _base()
    return {**case, "labels": case["labels"].int()}


_BUILDERS = (
    _plain,
    _odd_vocabulary,
    _float64,
    _bf16,
    _padded,
    _padding_fills_a_shard,
    _minus_inf_columns,
    _all_negative,
    _offset_1000,
    _shard_borders,
    _last_shard,
    _peaked,
    _hot,
    _cold_with_offset,
    _no_tokens,
    _one_token,
    _sequence_batch,
    _transposed,
    _expanded_gradients,
    _strided_gradients,
    _zero_weight_rows,
    _int32_labels,
)
_BY_NAME = {build.__name__.removeprefix("_"): build for build in _BUILDERS}
CASE_NAMES = tuple(_BY_NAME)


def head_case(name: str) -> HeadCase:
    """Build a case by its name; the same bits on every rank."""
    return HeadCase(**_BY_NAME[name]())
