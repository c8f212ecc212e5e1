"""Calls that compute on every rank and are wrong all the same: what the group's first call says of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_rest.ops import agreement, linear_log_probs_and_entropy, vocab_parallel_log_probs_and_entropy
from tests.helpers.distributed import run_distributed

ROWS, VOCAB = 6, 16


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, VOCAB, generator=generator), torch.randint(0, VOCAB // 2, (ROWS,), generator=generator)


def _say(call: Any) -> str:
    agreement._agreed.clear()  # each of these is a first call
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def _misuses(rank: int, size: int) -> dict[str, str]:
    logits, labels = _data()
    mine = logits.chunk(size, -1)[rank]
    group = dist.group.WORLD
    weight = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2))
    f = vocab_parallel_log_probs_and_entropy
    other = labels.clone()
    other[rank] = VOCAB // 2 + 1
    return {
        "right": _say(lambda: f(mine, labels, tp_group=group)),
        "whole logits": _say(lambda: f(logits, labels, tp_group=group)),
        "whole logits, size said": _say(lambda: f(logits, labels, tp_group=group, vocab_size=VOCAB)),
        "all zero": _say(lambda: f(torch.zeros_like(mine), labels, tp_group=group)),
        "labels differ": _say(lambda: f(mine, other, tp_group=group)),
        "rows differ": _say(lambda: f(mine[rank:], labels[rank:], tp_group=group)),
        "widths differ": _say(lambda: f(logits[:, : 8 + rank], labels, tp_group=group)),
        "sizes differ": _say(lambda: f(mine, labels, tp_group=group, vocab_size=VOCAB - rank)),
        "whole weight": _say(lambda: linear_log_probs_and_entropy(hidden, weight, labels, tp_group=group)),
        "weight": _say(lambda: linear_log_probs_and_entropy(hidden, weight.chunk(size)[rank], labels, tp_group=group)),
    }


EXPECTED = {
    "right": "",
    "whole logits": "pass tp_group=None",
    "whole logits, size said": "",  # exact: the second rank's columns are padding
    "all zero": "",  # a new output layer may be
    "labels differ": "the labels differ between the ranks",
    "rows differ": "the labels differ between the ranks",
    "widths differ": "every shard has the same width",
    "sizes differ": "pass the same to each",
    "whole weight": "pass tp_group=None",
    "weight": "",
}


def test_the_first_call_of_a_group_notices_what_no_rank_can_see() -> None:
    for said in run_distributed(_misuses, 2):
        assert said.keys() == EXPECTED.keys()
        for name, words in EXPECTED.items():
            assert (words in said[name]) if words else said[name] == "", (name, said[name])


def _forgotten(rank: int, size: int) -> list[str]:
    logits, labels = _data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            vocab_parallel_log_probs_and_entropy(logits, labels, vocab_size=VOCAB)
        assert not caught
        for _ in range(2):
            vocab_parallel_log_probs_and_entropy(logits.chunk(size, -1)[rank], labels.clamp(max=7))
    return [str(item.message) for item in caught]


def test_a_forgotten_group_is_said_once_where_several_processes_compute() -> None:
    for said in run_distributed(_forgotten, 2):
        assert len(said) == 1 and "the 8 columns are taken for the whole vocabulary" in said[0]


def _dtensors(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    logits, labels = _data()
    f = vocab_parallel_log_probs_and_entropy
    plain = logits.clone().requires_grad_()
    expected = f(plain, labels, vocab_size=VOCAB)
    (expected.log_probs.sum() + 0.3 * expected.entropy.sum()).backward()
    split = distribute_tensor(logits, mesh, [Shard(-1)]).requires_grad_()
    got = f(split, labels)
    (got.log_probs.sum() + 0.3 * got.entropy.sum()).backward()
    assert isinstance(split.grad, DTensor)
    weight = distribute_tensor(logits.t().contiguous(), mesh, [Shard(0)])
    odd = distribute_tensor(logits[:, :15].contiguous(), mesh, [Shard(-1)])
    return {
        "log_probs": float((got.log_probs - expected.log_probs).abs().max()),
        "gradient": float((split.grad.full_tensor() - plain.grad).abs().max()),  # type: ignore[operator]
        "whole": torch.equal(f(distribute_tensor(logits, mesh, [Replicate()]), labels).log_probs, expected.log_probs),
        "rows split": _say(lambda: f(distribute_tensor(logits, mesh, [Shard(0)]), labels)),
        "odd": _say(lambda: f(odd, labels)),
        "weight": _say(lambda: linear_log_probs_and_entropy(torch.randn(ROWS, ROWS), weight, labels)),
    }


def test_logits_of_loss_parallel_bring_their_group_along_and_other_layouts_are_refused() -> None:
    for said in run_distributed(_dtensors, 2):
        assert said["log_probs"] < 1e-6 and said["gradient"] < 1e-6 and said["whole"]
        assert "Shard(-1)" in said["rows split"]
        assert "do not divide over 2 ranks" in said["odd"]
        assert "weight.full_tensor()" in said["weight"]


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_ignored_labels_have_neither_value_nor_gradient(form: str) -> None:
    logits, labels = _data()
    marked = labels.clone()
    marked[[1, 4]] = -100
    leaf = logits.clone().requires_grad_()
    if form == "logits":
        got = vocab_parallel_log_probs_and_entropy(leaf, marked, ignore_index=-100, with_collision=True)
    else:
        weight = torch.eye(VOCAB)
        got = linear_log_probs_and_entropy(leaf, weight, marked, ignore_index=-100, with_collision=True)
    assert got.collision is not None
    expected = -F.cross_entropy(logits.double(), marked, reduction="none", ignore_index=-100)
    torch.testing.assert_close(got.log_probs.double(), expected, atol=1e-6, rtol=0)
    assert got.entropy[[1, 4]].tolist() == [0, 0] and got.collision[[1, 4]].tolist() == [0, 0]
    (got.log_probs.sum() + got.entropy.sum()).backward()
    assert leaf.grad is not None and not leaf.grad[[1, 4]].any() and leaf.grad[[0, 2, 3, 5]].any(1).all()
    with pytest.raises(ValueError, match="ignore_index"):
        vocab_parallel_log_probs_and_entropy(logits, marked)
