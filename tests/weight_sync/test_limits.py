"""Printed limits: known values, and loadable where there is no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_rest.weight_sync.limits import MODELS, Links, SyncSetting, main, sync_limits


def test_limits_of_large_models() -> None:
    """By hand: 671e9 weights in BF16 are 1342 GB; 50 GB/s a card."""
    deepseek = SyncSetting(num_parameters=671e9, train_gpus=256, engine_gpus=16)
    limits = sync_limits(deepseek)
    assert limits.broadcast == pytest.approx(26.84)
    assert limits.node_wide == pytest.approx(3.355)
    assert limits.slices == pytest.approx(1.6775)  # 16 takers; the 256 senders need 0.105 s
    assert sync_limits(replace(deepseek, engine_gpus=32)).slices == pytest.approx(0.83875)
    assert sync_limits(replace(deepseek, dtype="fp8")).slices == pytest.approx(0.83875 * (1 + 4 / 16384))
    many = replace(deepseek, train_gpus=32, replicas=8)
    assert sync_limits(many).slices == pytest.approx(8 * 1342 / (32 * 50))  # now the senders are the limit
    assert sync_limits(deepseek).expected == pytest.approx(2 * 1.6775)
    one_node = sync_limits(MODELS["70B"], Links(nvlink=450e9))
    assert one_node.colocated == pytest.approx(141.2 / 8 / 450)
    assert sync_limits(MODELS["70B"], Links(nvlink=5e12)).colocated == pytest.approx(2 * 141.2 / 8 / 3350)
    assert sync_limits(MODELS["8B"], Links(disk=1e9)).disk == pytest.approx(32.12)


def test_command_prints_a_table_and_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name.rjust(5)}" in printed for name in MODELS)
    assert main(["--model", "14", "--engine-gpus", "2", "--train-gpus", "16", "--replicas", "4"]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[:3] == ["14", "bfloat16", "28"] and row[-6] == "0.28"  # 28 GB into two cards of 50 GB/s
    for wrong in (["--model", "huge"], ["--engine-gpus", "0"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_needs_no_torch() -> None:
    code = "import sys, megatron_rest.weight_sync.limits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
