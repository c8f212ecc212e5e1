"""Triton projection with statistics in its epilogue: interpreted against float64, and compiled for sm_90."""

from __future__ import annotations

import glob
import os
import re
import subprocess
import tempfile

import pytest

pytest.importorskip("triton", reason="no triton (requirements/ci.txt): the projection is not tested")

from tests.ops.test_triton_rows import in_a_process

_SM90_SHARED_BYTES = 227 * 1024


@pytest.mark.slow
def test_statistics_and_exponentials_agree_with_float64() -> None:
    assert "agreed on 5 cases" in in_a_process("compare_with_float64", interpret=True, module=__name__)


def compare_with_float64() -> None:
    """Halves of a vocabulary that no tile divides, padded or not, folded and compared; nothing written beyond."""
    import torch

    from megatron_rest.ops import row_blocks
    from megatron_rest.ops.triton import projection_kernels
    from tests.helpers.reference import dense_tokens

    projection_kernels.TILES.update(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32)
    cases = [  # rows, hidden, columns of a half, true vocabulary, 1/T, dtype
        (19, 72, 150, 300, 1.0, torch.float32),
        (19, 72, 150, 300, 1.0, torch.bfloat16),
        (16, 64, 128, 201, 1.0 / 0.6, torch.bfloat16),
        (1, 40, 64, 65, 1.0, torch.float32),
        (33, 96, 100, 130, 1.0 / 1.7, torch.float16),
    ]
    for n, hidden, local, vocab_size, inverse, dtype in cases:
        gen = torch.Generator().manual_seed(n)
        x = torch.randn(n, hidden, generator=gen).to(dtype)
        weight = (torch.randn(2 * local, hidden, generator=gen) * 0.5).to(dtype)
        weight[vocab_size:] = float("nan")
        labels = torch.randint(0, vocab_size, (n,), generator=gen)
        logits = x.double() @ weight.double().t()
        parts = []
        for start in (0, local):
            columns = min(vocab_size - start, local)
            shard = row_blocks.VocabShard(start=start, local_size=local, num_columns=columns, vocab_size=vocab_size)
            e = torch.full((n, local), 7.0, dtype=torch.bfloat16)
            mine = projection_kernels.project_partials(
                x, weight[start : start + local], labels, shard, inverse, e, upcast=True
            )
            again = projection_kernels.project_partials(
                x, weight[start : start + local], labels, shard, inverse, upcast=True
            )
            assert torch.equal(mine, again)
            parts.append(mine)
            tile_max = mine[:, 0].repeat_interleave(projection_kernels.TILES["BLOCK_N"], dim=0)[:columns].t()
            expected = ((logits[:, start : start + columns] - tile_max) * inverse).exp()
            torch.testing.assert_close(e[:, :columns].double(), expected, atol=1e-4, rtol=1e-2)  # truncated to bf16
            assert (e[:, columns:] == 7.0).all(), "padded columns were written"
        stats = row_blocks.fold_partials(torch.cat(parts), inverse)
        dense = dense_tokens(logits, labels, temperature=1.0 / inverse, vocab_size=vocab_size)
        torch.testing.assert_close(stats.log_probs.double(), dense.log_probs, atol=1e-5, rtol=0)
        torch.testing.assert_close(stats.entropy.double(), dense.entropy, atol=1e-5, rtol=0)
    print("agreed on", len(cases), "cases")


@pytest.mark.slow
def test_compiles_for_sm90_with_tensor_cores_and_without_spills() -> None:
    pytest.importorskip("triton.backends.nvidia")
    report = in_a_process("compile_for_sm90", interpret=False, module=__name__)
    found = re.findall(r"STORE_E (\w+) registers (\d+) stack (\d+) shared (\d+) wgmma (\w+) cp_async (\w+)", report)
    assert [store for store, *_ in found] == ["False", "True"], report
    for store, _registers, stack, shared, wgmma, cp_async in found:
        assert int(stack) == 0, f"STORE_E={store} spills {stack} bytes"
        assert int(shared) <= _SM90_SHARED_BYTES, f"STORE_E={store} needs {shared} bytes of shared memory"
        assert wgmma == "True", f"STORE_E={store} does not use the warp-group matrix instruction"
        assert cp_async == "True", f"STORE_E={store} does not load ahead"


def compile_for_sm90() -> None:
    """bf16 operands, pointers and strides aligned to 16 as those of a contiguous weight are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_rest.ops.triton import projection_kernels

    (cuobjdump,) = glob.glob(os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump"))
    signature = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "labels_ptr": "*i64", "out_ptr": "*fp32", "e_ptr": "*bf16"}
    integers = ("num_rows", "hidden_size", "x_stride", "weight_stride", "e_stride", "start", "num_columns")
    signature |= dict.fromkeys(integers, "i32") | {"inverse_temperature": "fp32"}
    signature |= dict.fromkeys(("STORE_E", "UPCAST", *projection_kernels.TILES), "constexpr")
    aligned = ("x_ptr", "weight_ptr", "out_ptr", "e_ptr", "hidden_size", "x_stride", "weight_stride", "e_stride")
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": projection_kernels.NUM_WARPS, "num_stages": projection_kernels.NUM_STAGES}
    for store in (False, True):
        constants = {"STORE_E": store, "UPCAST": False, **projection_kernels.TILES}
        source = ASTSource(
            projection_kernels.projection_kernel, signature=signature, constexprs=constants, attrs=attributes
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            dump = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True).stdout
        usage = re.search(r"REG:(\d+).*?STACK:(\d+)", dump)
        assert usage is not None, dump
        wgmma, cp_async = (name in compiled.asm["ptx"] for name in ("wgmma.mma_async", "cp.async"))
        print(f"STORE_E {store} registers {usage[1]} stack {usage[2]} shared {compiled.metadata.shared}", end=" ")
        print(f"wgmma {wgmma} cp_async {cp_async}")
