"""A checkpoint is data: whatever its files say, loading one runs no code of theirs.

PyTorch's reader (2.13) unpickles two parts of a distributed checkpoint without a limit: ``.metadata``, and every entry
that is no tensor (``DefaultLoadPlanner.load_bytes`` passes ``weights_only=False``).  Here

* :func:`check_description` reads ``.metadata`` first, with an unpickler that knows the classes a description is made
  of and no others;
* within :func:`data_only` entries are loaded with ``weights_only``, and the environment variable that would switch
  that off for everything else (``common.pt`` included) is refused.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner

from megatron_rest.config import ConfigError

__all__ = ["check_description", "data_only"]

_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    "collections": {"OrderedDict"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}  # fmt: skip
_SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _ForeignNameError(pickle.UnpicklingError):
    """A pickle names something that its kind of file has no use for."""


class _DescriptionReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise _ForeignNameError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_description(path: str | Path) -> None:
    """Raise ConfigError if ``.metadata`` of the checkpoint in ``path`` names anything but what such a file holds.

    A damaged file is refused with the same error.
    """
    file = Path(path) / ".metadata"
    try:
        with file.open("rb") as stream:
            _DescriptionReader(stream).load()
    except FileNotFoundError:
        raise ConfigError(f"checkpoint.load: {path} is not a complete Megatron checkpoint (no .metadata)") from None
    except _ForeignNameError as error:
        raise ConfigError(
            f"checkpoint.load: {file} is not loaded, because {error}, which no checkpoint needs: who wrote it?"
        ) from None
    except Exception as error:  # bytes of any kind may be in there
        raise ConfigError(f"checkpoint.load: {file} is damaged ({type(error).__name__}: {error})") from error


@contextmanager
def data_only() -> Iterator[None]:
    """While it lasts, PyTorch's distributed checkpoints are read with ``weights_only`` throughout."""
    if os.environ.get(_SWITCH, "").lower() in ("1", "y", "yes", "true"):
        raise ConfigError(f"{_SWITCH} lets a checkpoint's files run code: unset it")
    planner: Any = default_planner.DefaultLoadPlanner
    before = planner.load_bytes
    planner.load_bytes = _load_bytes
    try:
        yield
    finally:
        planner.load_bytes = before


def _load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
    """``DefaultLoadPlanner.load_bytes`` with the limit that it lacks."""
    loaded = torch.load(value, weights_only=True)
    name = read_item.dest_index.fqn
    if self.flatten_state_dict:
        default_planner.set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
