"""What mbridge makes of an HF folder, for ``tests/mcore/test_mbridge.py``; runs in mbridge's own environment.

    .oracle/bin/python -m tests.oracles.mbridge_shards HF_FOLDER OUTPUT.safetensors TP...

For every TP size: each Megatron parameter (Transformer Engine's spelling, the one mbridge knows) fused, padded and cut
by mbridge as ``tp<n>/<rank>/<name>``, and put together again as ``tp<n>/hf/<HF name>``.  Only mbridge's conversions are
asked: its model construction wants Transformer Engine.  Which parameters there are, and the shape of a shard (mbridge
takes it from the live parameter), come from ``model_map``; everything else is mbridge's own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from mbridge.core.bridge import _MODEL_REGISTRY
from mbridge.core.parallel_states import ParallelStates
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_rest.model_map import ModelShape, padded_vocab_size, parameter_map, shard_shape

VOCAB_MULTIPLE = 64


def shards_of(folder: Path, tp: int) -> dict[str, torch.Tensor]:
    shape = ModelShape.from_hf_config(json.loads((folder / "config.json").read_text()), vocab_multiple=VOCAB_MULTIPLE)
    weights = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    config = AutoConfig.from_pretrained(folder)
    bridge_class = _MODEL_REGISTRY[config.model_type]
    bridge_class._DIRECT_MAPPING = dict(bridge_class._DIRECT_MAPPING)  # mbridge edits it in place for tied models
    bridge = bridge_class(
        config,
        dtype=next(iter(weights.values())).dtype,
        parallel_states=ParallelStates(tp_size=tp),
        make_vocab_size_divisible_by=VOCAB_MULTIPLE * tp,
    )
    bridge.vocab_size = shape.vocab_size
    bridge.padded_vocab_size = padded_vocab_size(shape.vocab_size, tp, VOCAB_MULTIPLE)
    out = {}
    for spec in parameter_map(shape):
        name = spec.alternatives[0] if spec.alternatives else spec.megatron_name
        hf_names = bridge._weight_name_mapping_mcore_to_hf(name)
        whole = bridge._weight_to_mcore_format(name, [weights[hf_name] for hf_name in hf_names])
        parameter = torch.empty(shard_shape(spec, shape, tp))
        cut = 1 if spec.expert is not None else tp  # experts are not cut: expert tensor parallelism is 1
        parts = bridge._weight_split_across_tp(name, whole, parameter, cut)
        out |= {f"tp{tp}/{rank}/{name}": part.contiguous().clone() for rank, part in enumerate(parts)}
        parameter.tensor_model_parallel, parameter.partition_dim = spec.shard_dim is not None, spec.shard_dim
        merged = bridge._weight_merge_across_tp(name, parts, parameter) if spec.shard_dim is not None else parts[0]
        names, tensors = bridge._weight_to_hf_format(name, merged)
        out |= {f"tp{tp}/hf/{n}": t.contiguous().clone() for n, t in zip(names, tensors, strict=True)}
    return out


def main(folder: str, output: str, *sizes: str) -> None:
    save_file({k: v for tp in sizes for k, v in shards_of(Path(folder), int(tp)).items()}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
