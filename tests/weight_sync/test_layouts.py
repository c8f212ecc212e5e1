"""A bounded part of the layout matrix (layouts.py has the whole): real Megatron into real vLLM at TP 2 and TP 1."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rest.config import RolloutQuantization
from tests.weight_sync.layouts import Training, check_model


@pytest.mark.extended
def test_megatron_layouts_into_two_replicas(tmp_path: Path) -> None:
    layouts = [Training(tp=2, pp=2), Training(tp=4), Training(pp=2)]
    model = {"arch": "qwen3", "tied": True, "layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    assert len(check_model(tmp_path, layouts, 4, **model)) == len(layouts)


@pytest.mark.extended
def test_a_sharded_policy_into_two_replicas_in_fp8(tmp_path: Path) -> None:
    """TP 2 cuts what shares a scale: both engines hold what vLLM's loader makes of a checkpoint in FP8, bit for bit."""
    model = {"arch": "qwen3", "tied": True, "layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    [line] = check_model(tmp_path, [Training(tp=2, pp=2)], 4, quantization=RolloutQuantization.FP8_CHANNEL, **model)
    assert "fp8_channel TP2 PP2" in line
