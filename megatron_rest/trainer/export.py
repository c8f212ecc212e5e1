"""An HF folder that vLLM and transformers load: what an engine would have received, written to safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_rest.data.chat_template import STOCK, ChatTemplate

__all__ = ["export_hf"]

_SHARD_BYTES = 5 << 30  # file size that Hugging Face's own writers use
_COPIED = ("*.json", "*.txt", "*.jinja", "*.model")


def export_hf(
    weights: Iterable[tuple[str, torch.Tensor]], *, base: str | Path, output: str | Path, chat_template: str = STOCK
) -> Path:
    """Write ``weights`` (every rank iterates them, rank 0 writes) beside the configuration and tokenizer of ``base``.

    ``chat_template`` as ``model.chat_template``: a server must render as training did.  The folder appears whole or not
    at all: it is written as ``<output>.partial`` and renamed.
    """
    base, output = Path(base), Path(output)
    partial = output.with_name(output.name + ".partial")
    is_writer = dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    files: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in weights:
        if not is_writer:
            continue  # iteration is a collective: every rank goes through all of it
        if size and size + tensor.nbytes > _SHARD_BYTES:
            _write(partial, files[-1], len(files))
            files.append({})
            size = 0
        files[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if is_writer:
        _write(partial, files[-1], len(files))
        _write_index(partial, files)
        for pattern in _COPIED:
            for path in base.glob(pattern):
                if not path.name.endswith(".safetensors.index.json"):
                    shutil.copy(path, partial / path.name)
        if chat_template != STOCK:
            text = ChatTemplate.of_folder(base, chat_template).text
            (partial / "chat_template.jinja").write_text(text, encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    dist.barrier()
    return output


def _file_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _write(folder: Path, tensors: dict[str, torch.Tensor], number: int) -> None:
    save_file(tensors, folder / _file_name(number), metadata={"format": "pt"})
    for name, tensor in tensors.items():
        tensors[name] = torch.empty(0, dtype=tensor.dtype)  # names are needed for the index, bytes are on disk


def _write_index(folder: Path, files: list[dict[str, torch.Tensor]]) -> None:
    if len(files) == 1:
        (folder / _file_name(1)).rename(folder / "model.safetensors")
        return
    weight_map = {name: _file_name(i) for i, tensors in enumerate(files, start=1) for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
