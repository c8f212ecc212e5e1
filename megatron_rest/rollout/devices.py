"""Which GPUs a process that is started here sees, and what its memory allocator may do.  Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["ALLOCATOR", "expands_segments", "visible_devices", "without_expandable_segments"]

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names of PyTorch's allocator settings, old and new."""

_EXPANDABLE = "expandable_segments"


def visible_devices(wanted: str, environ: Mapping[str, str] | None = None) -> str:
    """CUDA_VISIBLE_DEVICES of a child that shall see ``wanted``, indices with commas among the GPUs that this process
    sees: a job may own GPUs 4 to 7 of its node, by number or by name ("GPU-8932f937-...").

    Raises ValueError for an index that this process does not see.
    """
    mine = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    if mine is None:
        return wanted
    seen = [word.strip() for word in mine.split(",") if word.strip()]
    indices = [int(index) for index in wanted.split(",")]
    if missing := [index for index in indices if index >= len(seen)]:
        raise ValueError(
            f"GPUs {wanted} are asked for, and CUDA_VISIBLE_DEVICES={mine} shows {len(seen)}: there is no {missing[0]}"
        )
    return ",".join(seen[index] for index in indices)


def expands_segments(environ: Mapping[str, str] | None = None) -> bool:
    """Whether PyTorch is told to use expandable segments."""
    environ = os.environ if environ is None else environ
    return any(_is_on(word) for name in ALLOCATOR for word in environ.get(name, "").split(","))


def without_expandable_segments(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` as an engine gets it; other allocator settings stay.

    vLLM hands the addresses of its all-reduce's buffers to its other workers by cudaIpc, which refuses such memory.
    """
    result = dict(environ)
    for name in ALLOCATOR:
        if name in result:
            words = [word for word in result[name].split(",") if word and not _is_on(word)]
            if words:
                result[name] = ",".join(words)
            else:
                del result[name]
    return result


def _is_on(word: str) -> bool:
    key, _, value = word.partition(":")
    return key.strip() == _EXPANDABLE and value.strip().lower() in ("true", "1")
