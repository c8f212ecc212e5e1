"""A bounded part of the layout matrix (layouts.py has the whole): real Megatron into real vLLM at TP 2 and TP 1."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.weight_sync.layouts import Training, check_model


@pytest.mark.slow
def test_megatron_layouts_into_two_replicas(tmp_path: Path) -> None:
    layouts = [Training(tp=2, pp=2), Training(tp=4), Training(pp=2)]
    model = {"arch": "qwen3", "tied": True, "layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    assert len(check_model(tmp_path, layouts, 4, **model)) == len(layouts)
