"""Answers that continue a prompt, through the attention kernels of a GPU.  No GPU has run these tests yet.

The local attention of a CPU is compared over every layout in ``test_shared_prompts.py``.  On a GPU, Transformer Engine
could do the same in one call: every segment is a sequence of queries whose keys are its prompt's and its own, gathered,
under a causal mask that is aligned at the bottom right.  Here that call stands against plain packing, where each answer
has its own copy of the prompt: outputs and the gradients of queries, keys and values, and the time of both.

The host's part (which rows are gathered, where sequences begin) is compared on the CPU with attention written out in
float64; only the kernels themselves are left to the GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device"),
]

HEADS, GROUPS, SIZE = 32, 8, 128  # Qwen3-8B's
SHAPES = {  # prompt, response, answers, groups of a microbatch
    "tool calls": (748, 362, 4, 3),
    "multi-turn": (5060, 362, 8, 1),
    "long prompt": (8000, 100, 32, 1),
}
BF16_GAP = 2e-2  # of the largest value: another order of sums over thousands of keys, rounded to 8 bits


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Where rows lie in both packings: bounds int32 ``[S + 1]``, row numbers int64."""

    cu_queries: Tensor
    cu_keys: Tensor
    keys: Tensor  # shared rows that every segment sees: its prompt's and its own
    max_queries: int
    max_keys: int
    cu_plain: Tensor
    plain: Tensor  # the shared row that each plain one is a copy of
    max_plain: int
    once: Tensor  # a plain row for each shared one: of a prompt's copies the first

    @property
    def rows(self) -> int:
        return int(self.cu_queries[-1])

    def to(self, device: str) -> Calls:
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return Calls(**moved)


def calls_of(groups: list[tuple[int, list[int]]]) -> Calls:
    """``(prompt, answers)`` of every group, in rows; segments lie prompt first, then its answers."""
    queries, keys, plain, once = [], [], [], []
    key_lengths, plain_lengths = [], []
    at = place = 0
    for prompt, answers in groups:
        shared = torch.arange(at, at + prompt)
        queries.append(prompt)
        keys.append(shared)
        key_lengths.append(prompt)
        once.append(torch.arange(place, place + prompt))
        at += prompt
        for answer in answers:
            mine = torch.arange(at, at + answer)
            queries.append(answer)
            keys += [shared, mine]
            plain += [shared, mine]
            key_lengths.append(prompt + answer)
            plain_lengths.append(prompt + answer)
            once.append(torch.arange(place + prompt, place + prompt + answer))
            at += answer
            place += prompt + answer
    return Calls(
        cu_queries=_bounds(queries),
        cu_keys=_bounds(key_lengths),
        keys=torch.cat(keys),
        max_queries=max(queries),
        max_keys=max(key_lengths),
        cu_plain=_bounds(plain_lengths),
        plain=torch.cat(plain),
        max_plain=max(plain_lengths),
        once=torch.cat(once),
    )


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


class _Gather(torch.autograd.Function):
    """Rows by number; the gradients of a row's copies are added in float32."""

    @staticmethod
    def forward(ctx, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = values.shape
        return values.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=gradient.device)
        return total.index_add_(0, rows, gradient.to(wide)).to(gradient.dtype), None


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""queries ``[t, h, d]``, keys and values ``[u, g, d]``, bounds of both, longest of both -> ``[t, h, d]``; causal, the
last query of a sequence sees its last key."""


def shared_attention(kernel: Kernel, calls: Calls, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[t, h, d]`` of the shared packing: one call."""
    keys, values = _Gather.apply(k, calls.keys), _Gather.apply(v, calls.keys)
    return kernel(q, keys, values, calls.cu_queries, calls.cu_keys, calls.max_queries, calls.max_keys)


def plain_attention(kernel: Kernel, calls: Calls, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same rows, ``[t, h, d]``, from plain packing."""
    rows = (_Gather.apply(x, calls.plain) for x in (q, k, v))
    out = kernel(*rows, calls.cu_plain, calls.cu_plain, calls.max_plain, calls.max_plain)
    return out.index_select(0, calls.once)


def written_out(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Attention of every sequence as its formula says."""
    repeat = q.size(1) // k.size(1)
    outs = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert b - a <= max_q and d - c <= max_k
        keys, values = (x[c:d].repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * q.size(-1) ** -0.5
        seen = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).tril((d - c) - (b - a))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outs)


def inputs(calls: Calls, *, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Queries, keys, values, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    queries, groups, size = heads
    q, k, v = (torch.randn(calls.rows, n, size, generator=generator) for n in (queries, groups, groups))
    upstream = torch.randn(calls.rows, queries, size, generator=generator)
    return [*(x.to(device, dtype).requires_grad_() for x in (q, k, v)), upstream.to(device, dtype)]


def passes(attention: Callable[..., Tensor], calls: Calls, *values: Tensor) -> list[Tensor]:
    """Output and gradients of queries, keys and values."""
    *qkv, upstream = values
    for x in qkv:
        x.grad = None
    out = attention(calls, *qkv)
    out.backward(upstream)
    return [out.detach(), *(x.grad.clone() for x in qkv)]


def gaps(found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """Largest difference of each, of its largest value."""
    return {
        name: float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True)
    }


SMALL = [(7, [5, 1, 12]), (1, [3, 3]), (40, [4]), (16, [2] * 8)]


def test_both_packings_are_one_attention_in_float64():
    calls = calls_of(SMALL)
    values = inputs(calls, heads=(4, 2, 16), dtype=torch.float64, device="cpu")
    found = passes(lambda c, *x: shared_attention(written_out, c, *x), calls, *values)
    wanted = passes(lambda c, *x: plain_attention(written_out, c, *x), calls, *values)
    assert max(gaps(found, wanted).values()) < 1e-13
    assert calls.rows < int(calls.cu_plain[-1])


@pytest.mark.parametrize("wrong", ["top left", "sibling's prompt"])
def test_another_plan_is_seen(wrong):
    """What the comparison has to notice: the mask at the other corner, and keys of another group."""
    calls = calls_of(SMALL)
    values = inputs(calls, heads=(4, 2, 16), dtype=torch.float64, device="cpu")

    def top_left(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        """Every sequence's queries see the first keys only."""
        first = torch.cat([torch.arange(c, c + b - a) for (a, b), c in zip(pairwise(cu_q), cu_k[:-1], strict=True)])
        return written_out(q, k[first], v[first], cu_q, cu_q, max_q, max_q)

    kernel = top_left if wrong == "top left" else written_out
    shifted = calls if wrong == "top left" else Calls(**{**vars(calls), "keys": calls.keys.roll(1)})
    found = passes(lambda _, *x: shared_attention(kernel, shifted, *x), calls, *values)
    wanted = passes(lambda c, *x: plain_attention(written_out, c, *x), calls, *values)
    assert max(gaps(found, wanted).values()) > 1e-2


def transformer_engine(heads: tuple[int, int, int], backend: str) -> Kernel:
    """Its ``DotProductAttention``, called as packed sequences are."""
    te = pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed here")
    import os

    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as module

    for name in ("FLASH", "FUSED", "UNFUSED"):
        os.environ[f"NVTE_{name}_ATTN"] = str(int(backend in ("any", name.lower())))
    state = getattr(module, "_attention_backends", None)
    if state is not None:
        state["backend_selection_requires_update"] = True
    queries, groups, size = heads
    layer = te.DotProductAttention(
        queries, size, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding_causal"
    ).cuda()

    def call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        out = layer(
            q, k, v,
            qkv_format="thd",
            attn_mask_type="padding_causal" if cu_q is cu_k else "padding_causal_bottom_right",
            cu_seqlens_q=cu_q,
            cu_seqlens_kv=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_kv=max_k,
        )  # fmt: skip
        return out.view(q.shape)

    return call


def torch_varlen(heads: tuple[int, int, int], backend: str) -> Kernel:
    """``torch.nn.attention.varlen``: causal is a window without a right side, aligned at the bottom right."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no torch.nn.attention.varlen")

    def call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        return varlen.varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0), enable_gqa=True)

    return call


@pytest.fixture(autouse=True)
def backends_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine reads its choice of kernels from the environment."""
    for name in ("FLASH", "FUSED", "UNFUSED"):
        monkeypatch.setenv(f"NVTE_{name}_ATTN", "1")


class TestKernels:
    pytestmark = gpu

    @pytest.mark.parametrize("make", [transformer_engine, torch_varlen])
    def test_small_groups_against_float64(self, make):
        heads = (8, 2, 128)
        calls = calls_of(SMALL)
        exact = inputs(calls, heads=heads, dtype=torch.float64, device="cpu")
        wanted = passes(lambda c, *x: plain_attention(written_out, c, *x), calls, *exact)
        kernel, on_device = make(heads, "any"), calls.to("cuda")
        values = inputs(calls, heads=heads, dtype=torch.bfloat16, device="cuda")
        for attention in (shared_attention, plain_attention):
            found = passes(lambda c, *x, a=attention: a(kernel, c, *x), on_device, *values)
            gap = gaps([x.cpu() for x in found], wanted)
            print(make.__name__, attention.__name__, {name: f"{value:.1e}" for name, value in gap.items()})
            assert max(gap.values()) < BF16_GAP, gap

    def test_small_groups_in_float32(self):
        """Where a kernel takes float32 at all: Transformer Engine's unfused one."""
        heads = (8, 2, 128)
        calls = calls_of(SMALL)
        kernel, on_device = transformer_engine(heads, "unfused"), calls.to("cuda")
        values = inputs(calls, heads=heads, dtype=torch.float32, device="cuda")
        try:
            found = passes(lambda c, *x: shared_attention(kernel, c, *x), on_device, *values)
        except (ValueError, AssertionError, RuntimeError, NotImplementedError) as error:
            pytest.skip(f"its unfused attention takes no float32 here: {' '.join(str(error).split())[:200]}")
        wanted = passes(lambda c, *x: plain_attention(kernel, c, *x), on_device, *values)
        assert max(gaps(found, wanted).values()) < 1e-3, "products may run in TF32"

    @pytest.mark.parametrize("make", [transformer_engine, torch_varlen])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_real_lengths_and_their_time(self, shape, make):
        prompt, response, answers, count = SHAPES[shape]
        heads = (HEADS, GROUPS, SIZE)
        calls = calls_of([(prompt - 1, [response] * answers)] * count)
        kernel, on_device = make(heads, "any"), calls.to("cuda")
        values = inputs(calls, heads=heads, dtype=torch.bfloat16, device="cuda")

        def shared(c: Calls, *x: Tensor) -> Tensor:
            return shared_attention(kernel, c, *x)

        def plain(c: Calls, *x: Tensor) -> Tensor:
            return plain_attention(kernel, c, *x)

        gap = gaps(passes(shared, on_device, *values), passes(plain, on_device, *values))
        times = {f.__name__: milliseconds(f, on_device, *values) for f in (shared, plain)}
        print(
            f"{make.__name__}, {shape}: rows {len(calls.plain):,} -> {calls.rows:,}, a layer's attention forward and "
            f"backward {times['plain']:.2f} -> {times['shared']:.2f} ms, "
            f"gaps {', '.join(f'{name} {value:.1e}' for name, value in gap.items())}"
        )
        assert max(gap.values()) < BF16_GAP, gap


def milliseconds(attention: Callable[..., Tensor], calls: Calls, *values: Tensor, repeats: int = 10) -> float:
    """Median of both passes, after three that warm up."""
    found = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        passes(attention, calls, *values)
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            found.append(begin.elapsed_time(end))
    return statistics.median(found)
