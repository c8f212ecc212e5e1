"""HF safetensors -> Megatron shards: each rank reads the tensors it needs and keeps its slice.

Names, fusions and shard dimensions come from ``model_map``; the way back (shards -> full HF tensors) is the weight
synchronisation's source, so that an exported folder holds exactly what an engine would have received.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rest.config import ConfigError
from megatron_rest.hf_folder import refuse_remote_code
from megatron_rest.model_map import ModelShape, ParameterKind, parameter_map, to_megatron

__all__ = ["INDEX_FILE", "load_hf_weights", "read_shape"]

INDEX_FILE = "model.safetensors.index.json"
HEAD = "lm_head.weight"

_log = logging.getLogger(__name__)


def read_shape(folder: str | Path) -> ModelShape:
    """Model shape of an HF folder.

    Raises :class:`ConfigError` if ``config.json`` cannot be read or used, or asks for dropout: RL compares log-probs
    of the same network in different passes, and dropout would make every ratio noise.
    """
    path = Path(folder) / "config.json"
    refuse_remote_code(folder)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shape = ModelShape.from_hf_config(values)
    except OSError as error:
        raise ConfigError(
            f"model.path: cannot read {path} ({error.strerror}); give a Hugging Face model folder"
        ) from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise ConfigError(f"model.path: {path} is not a usable model configuration: {error}") from error
    dropout = {name: value for name, value in values.items() if name.endswith("dropout") and value}
    if dropout:
        raise ConfigError(
            f"model.path: {path} asks for dropout {dropout}, which RL cannot use: set it to 0.0 in that file"
        )
    return shape


class _Safetensors(Mapping[str, Tensor]):
    """All tensors of a folder by name, read lazily: of the files that its index names, else of all ``*.safetensors``.

    What the index does not name was left over by somebody: an earlier export, the unsharded file, an adapter, the same
    weights under other names (``consolidated``).  Without an index a name that stands in two files would be one or the
    other by chance, and is refused.
    """

    def __init__(self, folder: Path) -> None:
        files = _weight_files(folder)
        self._handles = [_open(f) for f in files]
        self._where: dict[str, Any] = {}
        owner: dict[str, Path] = {}
        for file, handle in zip(files, self._handles, strict=True):
            for name in handle.keys():  # noqa: SIM118  not a mapping
                if name in owner:
                    raise ConfigError(
                        f"model.path: {name} stands in {owner[name].name} and in {file.name}, and {folder} has no "
                        f"{INDEX_FILE} that says which counts: remove the file that was left over"
                    )
                owner[name], self._where[name] = file, handle

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Any:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _weight_files(folder: Path) -> list[Path]:
    other = ("adapter_", "consolidated")  # an adapter; the same weights under Mistral's and Llama's own names
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(other))
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            listed = [folder / Path(name).name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"model.path: {index} is no index of weights ({type(error).__name__}: {error})"
            ) from error
        missing = [file.name for file in listed if not file.is_file()]
        if missing:
            whole = "; or is the index left over, and model.safetensors has everything? Then remove the index"
            raise ConfigError(
                f"model.path: {index} names {missing[0]}, which is not there: was the copy complete"
                f"{whole if folder / 'model.safetensors' in files else '?'}"
            )
        left = [file.name for file in files if file not in listed]
        if "model.safetensors" in left:
            raise ConfigError(
                f"model.path: {folder} has model.safetensors, which transformers reads, and {INDEX_FILE}, which names "
                "other files and which vLLM reads: remove what was left over"
            )
        if left:
            _log.warning("%s: %s is not in %s and is not read", folder, ", ".join(left), INDEX_FILE)
        return listed
    if not files:
        raise ConfigError(f"model.path: no *.safetensors in {folder}; weights are read from safetensors only")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"model.path: {file} is damaged or no safetensors file: {error}") from error


def _refuse_unmapped(source: Collection[str], folder: str | Path, shape: ModelShape) -> None:
    """Raise ConfigError for tensors that nothing reads: a bias or a layer more than config.json says is no detail."""
    mapped = {name for spec in parameter_map(shape) for name in spec.hf_names} | {HEAD}
    # Old exports have the rotary frequencies, which are computed.
    left = sorted(name for name in source if name not in mapped and not name.endswith("rotary_emb.inv_freq"))
    if left:
        raise ConfigError(
            f"model.path: {folder} has {left[0]} ({len(left)} such tensors), for which a {shape.model_type} model of "
            "its config.json has no place: it would compute something else without them. Is config.json that of the "
            "weights?"
        )


@torch.no_grad()
def load_hf_weights(
    shards: Mapping[str, Tensor], folder: str | Path, shape: ModelShape, *, tp_rank: int, tp_size: int
) -> None:
    """Fill ``shards`` (Megatron name with global layer number -> this rank's parameter) from an HF folder.

    Every shard must be in the map and every map entry that this rank holds must be in the folder; else ``ConfigError``.
    """
    source = _Safetensors(Path(folder))
    _refuse_unmapped(source, folder, shape)
    filled = set()
    for spec in parameter_map(shape):
        for name in (spec.megatron_name, *spec.alternatives, *spec.tied_copies):
            if name not in shards:
                continue
            missing = [n for n in spec.hf_names if n not in source]
            if missing:
                raise ConfigError(f"model.path: {folder} lacks {missing[0]}, which Megatron's {name} is made of")
            try:
                shard = to_megatron(spec, source, tp_rank=tp_rank, tp_size=tp_size, shape=shape)
            except (ValueError, SafetensorError) as error:
                raise ConfigError(f"model.path: {folder} does not fit its config.json: {error}") from error
            if shard.shape != shards[name].shape:
                raise ConfigError(
                    f"{name}: the folder gives {tuple(shard.shape)}, the model has {tuple(shards[name].shape)}"
                )
            if HEAD in source and shape.tied_embeddings and spec.kind is ParameterKind.VOCAB:
                head = to_megatron(
                    spec, {spec.hf_names[0]: source[HEAD]}, tp_rank=tp_rank, tp_size=tp_size, shape=shape
                )
                if not torch.equal(head, shard):
                    raise ConfigError(
                        f"model.path: {folder} ties the head to the embedding (tie_word_embeddings), but its {HEAD} is "
                        "another: set tie_word_embeddings to false in config.json, or remove that tensor"
                    )
            shards[name].copy_(shard)
            filled.add(name)
    left = sorted(set(shards) - filled)
    if left:
        raise ConfigError(
            f"no map from Hugging Face names to {left[0]} ({len(left)} parameters); is the model type supported?"
        )
