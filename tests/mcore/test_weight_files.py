"""Which files of a folder are its weights, and what an exported folder carries along."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_rest.config import ConfigError
from megatron_rest.mcore.hf import INDEX_FILE, _Safetensors, load_hf_weights, read_shape
from megatron_rest.trainer.export import export_hf
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_model import build_tiny_model


def index(folder: Path, where: dict[str, str]) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_the_index_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"a": torch.full((2,), 7.0), "c": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with caplog.at_level(logging.WARNING):
        found = _Safetensors(tmp_path)
    assert sorted(found) == ["a", "b"]
    assert found["a"].tolist() == [0, 0]
    assert "model-00001-of-00001.safetensors is not in" in caplog.text


def test_a_name_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    for name in ("model", "model-00001-of-00002"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"a stands in .* and in .* remove the file that was left over"):
        _Safetensors(tmp_path)


def test_adapters_and_copies_under_other_names_are_no_weights(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    found = _Safetensors(tmp_path)
    assert list(found) == ["a"] and found["a"].tolist() == [0, 0]


def test_a_whole_file_beside_the_shards_of_an_index_is_refused(tmp_path: Path) -> None:
    """transformers takes the first, vLLM the second: a policy would not start where its engine does."""
    for name in ("model", "model-00001-of-00001"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    index(tmp_path, {"a": "model-00001-of-00001.safetensors"})
    with pytest.raises(ConfigError, match=r"has model.safetensors, which transformers reads, .* remove what was left"):
        _Safetensors(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        arch: build_tiny_model(folder / arch, arch=arch, tied=arch == "qwen3", with_tokenizer=False)
        for arch in ("qwen3", "llama")
    }


def with_tensors(folder: Path, base: Path, **extra: torch.Tensor) -> Path:
    shutil.copytree(base, folder)
    save_file({**load_file(base / "model.safetensors"), **extra}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.bias"),  # attention_bias is not in config.json
        ("llama", "model.layers.2.self_attn.q_proj.weight"),  # num_hidden_layers was made smaller
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("qwen3", "model.layers.0.self_attn.q_proj.weight_scale_inv"),  # quantised, and config.json does not say so
        ("qwen3", "score.weight"),
        ("qwen3", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    ],
)
def test_a_tensor_that_nothing_reads_is_refused_by_name(arch: str, name: str, folders: Any, tmp_path: Path) -> None:
    folder = with_tensors(tmp_path / "model", folders[arch], **{name: torch.ones(4)})
    with pytest.raises(ConfigError, match=rf"has {re.escape(name)} \(1 such tensors\), for which a {arch} model"):
        load_hf_weights({}, folder, read_shape(folder), tp_rank=0, tp_size=1)


def test_a_tied_head_may_be_stored_and_another_head_is_refused(folders: Any, tmp_path: Path) -> None:
    """transformers 5 then leaves the head untied, vLLM ties it."""
    embedding = load_file(folders["qwen3"] / "model.safetensors")["model.embed_tokens.weight"]
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # of old exports; computed anyway
    same = with_tensors(tmp_path / "same", folders["qwen3"], **{"lm_head.weight": embedding.clone(), **inv_freq})
    other = with_tensors(tmp_path / "other", folders["qwen3"], **{"lm_head.weight": embedding + 1})
    for rank in (0, 1):
        shards = {"embedding.word_embeddings.weight": torch.empty(-(-len(embedding) // 2), embedding.shape[1])}
        load_hf_weights(shards, same, read_shape(same), tp_rank=rank, tp_size=2)
        with pytest.raises(ConfigError, match=r"set tie_word_embeddings to false in config.json, or"):
            load_hf_weights(shards, other, read_shape(other), tp_rank=rank, tp_size=2)


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", json.dumps({"weight_map": ["a"]}), json.dumps({"weight_map": {"a": 1}})]
)
def test_a_damaged_index_is_one_line(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(ConfigError, match="is no index of weights"):
        _Safetensors(tmp_path)


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    index(tmp_path, {"a": "model-00001-of-00001.safetensors"})
    with pytest.raises(ConfigError, match=r"which is not there: was the copy complete\?$"):
        _Safetensors(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.safetensors has everything\? Then remove the index"):
        _Safetensors(tmp_path)


def export(rank: int, world_size: int, base: str, output: str, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(f"{base}/model.safetensors").items()}
    assert dist.get_world_size() == world_size
    export_hf(weights.items(), base=base, output=output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_carries_what_belongs_to_it_and_nothing_stale(tmp_path: Path, dtype: torch.dtype) -> None:
    base = build_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    kept = {"generation_config.json": "{}", "chat_template.jinja": "x", "LICENSE": "l", "LICENSE.txt": "l",
            "NOTICE": "n", "USE_POLICY.md": "u", "README.md": "c", "merges.txt": "m", "vocab.json": "{}"}  # fmt: skip
    stale = {"adapter_config.json": "{}", "adapter_model.safetensors": "", INDEX_FILE: "{}", "trainer_state.json": "{}",
             "pytorch_model.bin.index.json": "{}", "training_args.bin": ""}  # fmt: skip
    for name, text in {**kept, **stale}.items():
        (base / name).write_text(text)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    run_distributed(export, 1, str(base), str(tmp_path / "out"), dtype)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found >= {
        *kept,
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "additional_chat_templates/tool_use.jinja",
    }
    assert not found & stale.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
