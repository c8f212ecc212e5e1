"""The parameter table against mbridge 0.15.1: the same fused, padded and cut tensors, bit for bit.

mbridge wants transformers < 5 and lives in an environment of its own: ``make oracle`` builds ``.oracle``; without it
these tests are skipped and say so.  ``MBRIDGE_PYTHON`` names another interpreter that has it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rest.mcore.hf import read_shape
from megatron_rest.model_map import ModelShape, parameter_map, to_hf, to_megatron
from tests.helpers.tiny_model import build_tiny_model, read_config

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MBRIDGE_PYTHON", ROOT / ".oracle" / "bin" / "python"))
SIZES = (1, 2, 4)
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-tied": {"arch": "qwen2", "tied": True},
    "qwen3-untied": {"arch": "qwen3", "tied": False},
    "llama-untied": {"arch": "llama", "tied": False},
    "qwen3_moe": {"arch": "qwen3_moe", "tied": False},
}

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"mbridge is not installed at {PYTHON}: `make oracle` builds its environment"
)


@pytest.mark.extended
@pytest.mark.parametrize("name", MODELS)
def test_shards_are_those_of_mbridge(name: str, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "hf", num_attention_heads=8, num_key_value_heads=4, **MODELS[name])
    output = tmp_path / "mbridge.safetensors"
    command = [str(PYTHON), "-W", "ignore", "-m", "tests.oracles.mbridge_shards", str(folder), str(output)]
    done = subprocess.run(
        [*command, *map(str, SIZES)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = load_file(output)
    shape = ModelShape.from_hf_config(read_config(folder), vocab_multiple=64)
    assert shape.vocab_size == read_shape(folder).vocab_size
    weights = load_file(folder / "model.safetensors")
    ours: dict[str, torch.Tensor] = {}
    for tp in SIZES:
        for spec in parameter_map(shape):
            te_name = spec.alternatives[0] if spec.alternatives else spec.megatron_name
            shards = [to_megatron(spec, weights, tp_rank=r, tp_size=tp, shape=shape) for r in range(tp)]
            ours |= {
                f"tp{tp}/{r}/{te_name}": s for r, s in enumerate(shards[:1] if spec.expert is not None else shards)
            }
            ours |= {f"tp{tp}/hf/{n}": t for n, t in to_hf(spec, shards, shape=shape).items()}
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, different[:5]
