"""An HF folder that vLLM and transformers load: what an engine would have received, written to safetensors."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_rest.data.chat_template import STOCK, ChatTemplate

__all__ = ["export_hf"]

_SHARD_BYTES = 5 << 30  # file size that Hugging Face's own writers use
# What a loader needs besides the weights (configuration, tokenizer, templates), and a lawyer: licence, notice, card.
_COPIED = (
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.md",
)
# What describes other weights than these: indices, adapters, quantised or optimiser states of the base.
_STALE = ("*.index.json", "adapter_*", "trainer_state.json", "training_args*", "quantize_config.json", "*.safetensors*")


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
    dtypes: Counter[torch.dtype] = Counter()
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
        dtypes[tensor.dtype] += tensor.numel()
    if is_writer:
        _write(partial, files[-1], len(files))
        _write_index(partial, files)
        _copy_the_rest(base, partial, dtypes)
        if chat_template != STOCK:
            text = ChatTemplate.of_folder(base, chat_template).text
            (partial / "chat_template.jinja").write_text(text, encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    dist.barrier()
    return output


def _copy_the_rest(base: Path, folder: Path, dtypes: Counter[torch.dtype]) -> None:
    """Everything of ``base`` but its weights; the configuration says the data type that most elements have now."""
    for path in sorted({path for pattern in _COPIED for path in base.glob(pattern) if path.is_file()}):
        if not any(fnmatch(path.name, pattern) for pattern in _STALE):
            shutil.copy(path, folder / path.name)
    if (base / "additional_chat_templates").is_dir():
        shutil.copytree(base / "additional_chat_templates", folder / "additional_chat_templates")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    dtype = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    if any(config.get(name) != dtype for name in names):
        path.write_text(json.dumps(config | dict.fromkeys(names, dtype), indent=2, ensure_ascii=False) + "\n", "utf-8")


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
