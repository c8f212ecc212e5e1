"""Triton row kernels: through the interpreter against the eager passes, and compiled ahead of time for sm_90.

Both run in a process of their own: whether ``triton.jit`` interprets is decided when a kernel is defined.
"""

from __future__ import annotations

import glob
import os
import re
import subprocess
import sys
import tempfile

import pytest

triton = pytest.importorskip("triton", reason="no triton (requirements/ci.txt): the row kernels are not tested")

_SM90_SHARED_BYTES = 227 * 1024


def in_a_process(function: str, *, interpret: bool, module: str = __name__) -> str:
    """Standard output of ``module.function()`` run by a fresh Python, with or without Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", f"from {module} import {function}; {function}()"],
            env=env | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_kernels_agree_with_the_eager_passes() -> None:
    assert "agreed on 20 cases" in in_a_process("compare_with_eager", interpret=True)


def compare_with_eager() -> None:
    """Every input of ``cases``, both halves of a split vocabulary, gradient in place and beside the logits."""
    import torch

    from megatron_rest.ops import row_blocks, row_statistics, sharding
    from megatron_rest.ops.triton import row_kernels
    from tests.ops.cases import CASE_NAMES, head_case

    row_kernels._MAX_TILE = 256  # several tiles a row
    names = [name for name in CASE_NAMES if name not in ("no_tokens", "float64")]  # never launched for these
    for name in names:
        case = head_case(name)
        rows = slice(0, 5)  # the interpreter takes milliseconds a tile
        whole, labels = case.logits.reshape(-1, case.logits.shape[-1])[rows], case.labels.reshape(-1)[rows]
        grad_log_probs, entropy_gradient = (g.reshape(-1)[rows] for g in (case.grad_log_probs, case.grad_entropy))
        n, local = len(labels), whole.shape[1] // 2
        inverse = 1.0 / case.options.get("temperature", 1.0)
        vocab_size = case.options.get("vocab_size", 2 * local)
        halves = []
        for logits, start in zip(whole.chunk(2, dim=1), (0, local), strict=True):  # rows keep the stride of the whole
            num_columns = min(max(vocab_size - start, 0), local)
            shard = sharding.VocabShard(start=start, local_size=local, num_columns=num_columns, vocab_size=vocab_size)
            scratch = row_blocks.Scratch(torch.float32, logits.device)
            halves.append((logits, shard, scratch))
        partials = torch.empty(2, 5, n)
        for (logits, shard, scratch), expected in zip(halves, partials, strict=True):
            actual = torch.full((5, 2 * n), 7.0)
            row_blocks.write_partials(logits, labels, shard, inverse, expected, scratch)
            row_kernels.write_partials(logits, labels, shard, inverse, actual[:, :n])
            has_loss = torch.ones(n, dtype=torch.bool) if case.nan_rows is None else ~case.nan_rows[rows]
            torch.testing.assert_close(actual[:, :n][:, has_loss], expected[:, has_loss], atol=1e-5, rtol=2e-6)
            assert actual[1, :n][~has_loss].isnan().all(), "NaN logits must not look like a distribution"
            assert (actual[:, n:] == 7.0).all(), "wrote beyond its columns of the partials"
        stats = row_statistics.fold_partials(partials, inverse)
        for grad_entropy in (None, entropy_gradient):
            rule = row_statistics.GradientRule.create(
                max_logit=stats.max_logit,
                log_sum=stats.log_sum,
                entropy=stats.entropy,
                grad_log_probs=grad_log_probs,
                grad_entropy=grad_entropy,
                inverse_temperature=inverse,
            )
            for logits, shard, scratch in halves:
                out, beside, in_place = torch.empty_like(logits), torch.empty_like(logits), logits.clone()
                row_blocks.write_gradient(logits, labels, shard, inverse, rule, out, scratch)
                row_kernels.write_gradient(logits, labels, shard, inverse, rule, beside)
                row_kernels.write_gradient(in_place, labels, shard, inverse, rule, in_place)
                limit = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[logits.dtype]  # the interpreter truncates to bf16
                torch.testing.assert_close(beside, out, atol=limit, rtol=limit)
                assert torch.equal(in_place, beside)
    print("agreed on", len(names), "cases")


@pytest.mark.slow
def test_kernels_compile_for_sm90_without_spills() -> None:
    pytest.importorskip("triton.backends.nvidia")
    report = in_a_process("compile_for_sm90", interpret=False)
    found = re.findall(r"(\w+) (\w+) registers (\d+) stack (\d+) shared (\d+)", report)
    assert len(found) == 8, report
    for kernel, dtype, registers, stack, shared in found:
        assert int(stack) == 0, f"{kernel} {dtype} spills {stack} bytes"
        assert int(registers) <= 128 and int(shared) <= _SM90_SHARED_BYTES, (kernel, dtype, registers, shared)


def compile_for_sm90() -> None:
    """Ahead-of-time compilation needs no GPU; registers and stack come from the assembler's own report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_rest.ops.triton import row_kernels

    (cuobjdump,) = glob.glob(os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump"))
    for dtype in ("*bf16", "*fp32"):
        statistics = {"logits_ptr": dtype, "labels_ptr": "*i64", "out_ptr": "*fp32"}
        statistics |= dict.fromkeys(("row_stride", "out_stride", "start", "num_columns"), "i32")
        gradient = {"logits_ptr": dtype, "out_ptr": dtype, "labels_ptr": "*i64"}
        gradient |= dict.fromkeys(("max_logit_ptr", "slope_ptr", "intercept_ptr", "at_label_ptr"), "*fp32")
        gradient |= {"is_active_ptr": "*i8"}
        gradient |= dict.fromkeys(("row_stride", "out_row_stride", "start", "num_columns", "local_size"), "i32")
        for flag in (False, True):
            for kernel, signature, option in (
                (row_kernels.statistics_kernel, statistics, "WITH_COLLISION"),
                (row_kernels.gradient_kernel, gradient, "HAS_SLOPE"),
            ):
                full = {**signature, "inverse_temperature": "fp32", option: "constexpr", "TILE": "constexpr"}
                source = ASTSource(kernel, signature=full, constexprs={option: flag, "TILE": row_kernels._MAX_TILE})
                target = GPUTarget("cuda", 90, 32)
                compiled = triton.compile(source, target=target, options={"num_warps": row_kernels._NUM_WARPS})
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(compiled.asm["cubin"])
                    file.flush()
                    dump = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True).stdout
                usage = re.search(r"REG:(\d+).*?STACK:(\d+)", dump)
                assert usage is not None, dump
                print(kernel.__name__, dtype[1:], "registers", usage[1], "stack", usage[2], "shared",
                      compiled.metadata.shared)  # fmt: skip
