"""Rollouts of one step in a file: what was sampled, how it was judged and how it was weighted.

    RUN_DIR/rollouts/step_000020.npz       numpy archive of plain arrays, never pickled

Sequences lie behind each other (``lengths`` says where they end); index t of every ``[T]`` array speaks of
``token_ids[t]`` itself.  About 20 bytes a token before compression.
"""

from __future__ import annotations

import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from megatron_rest.types import TrainSample

__all__ = ["RolloutWriter", "SavedRollouts", "read_rollouts", "rollout_files", "rollout_path", "write_rollouts"]

_DTYPES = {
    "lengths": np.int64,
    "group_ids": np.int32,
    "advantages": np.float32,
    "rewards": np.float32,
    "token_ids": np.int32,
    "loss_mask": np.bool_,
    "region_ids": np.int8,
    "rollout_log_probs": np.float32,
    "old_log_probs": np.float32,
    "entropy": np.float32,
    "token_weights": np.float32,
    "beta": np.float32,
    "token_advantages": np.float32,
    "versions": np.int32,
}
_OPTIONAL = ("beta", "token_advantages", "versions")
_PER_SEQUENCE = ("group_ids", "advantages", "rewards")
_FILE = re.compile(r"step_(\d{6,})\.npz")
# zipfile's own, its decompressors', and RuntimeError for an encrypted entry or an unknown compression method
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRollouts:
    """N sequences of T tokens in all; per-token values are 0 on tokens that carry no loss (prompts, tool outputs)."""

    step: int  # 1-based; sampled with the weights after step - 1
    progress: float  # of the curriculum
    lengths: np.ndarray  # int64 [N], prompt + response
    group_ids: np.ndarray  # int32 [N], siblings of a prompt share one
    advantages: np.ndarray  # float32 [N]
    rewards: np.ndarray  # float32 [N], total
    token_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]
    region_ids: np.ndarray  # int8 [T], TokenRegion
    rollout_log_probs: np.ndarray  # float32 [T], the engine's, nats
    old_log_probs: np.ndarray  # float32 [T], the trainer's before the step's first update, nats
    entropy: np.ndarray  # float32 [T], nats
    token_weights: np.ndarray  # float32 [T]
    beta: np.ndarray | None = None  # float32 [T], squared score norms, where the run measures them
    token_advantages: np.ndarray | None = None  # float32 [T], where weighting.source may give each token its own
    versions: np.ndarray | None = None  # int32 [T], policy version that sampled each token; older files have none

    def __post_init__(self) -> None:
        num_tokens = int(self.lengths.sum())
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array is None and name in _OPTIONAL:
                continue
            expected = len(self.lengths) if name in ("lengths", *_PER_SEQUENCE) else num_tokens
            if array.dtype != dtype or array.shape != (expected,):
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} ({expected},)")

    @property
    def slices(self) -> list[slice]:
        """Where each sequence lies."""
        ends = np.cumsum(self.lengths).tolist()
        return [slice(end - int(n), end) for end, n in zip(ends, self.lengths, strict=True)]

    @classmethod
    def of(
        cls,
        samples: Sequence[TrainSample],
        *,
        step: int,
        progress: float,
        rewards: Sequence[float],
        group_ids: Sequence[int],
        scores: dict[str, np.ndarray],
    ) -> SavedRollouts:
        """``scores``: the ``[T]`` arrays that sampling, the scoring pass and the weighting made, in the order of
        ``samples``.
        """
        return cls(
            step=step,
            progress=progress,
            lengths=np.array([len(s.token_ids) for s in samples], np.int64),
            group_ids=np.array(group_ids, np.int32),
            advantages=np.array([s.advantage for s in samples], np.float32),
            rewards=np.array(rewards, np.float32),
            token_ids=np.concatenate([s.token_ids for s in samples]),
            loss_mask=np.concatenate([s.loss_mask for s in samples]),
            region_ids=np.concatenate([s.region_ids for s in samples]),
            rollout_log_probs=np.concatenate([s.rollout_log_probs for s in samples]),
            **scores,
        )


def rollout_path(run_dir: str | Path, step: int) -> Path:
    """Where the rollouts of ``step`` are."""
    return Path(run_dir) / "rollouts" / f"step_{step:06d}.npz"


def rollout_files(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, file) of every saved step, in order."""
    found = [(_FILE.fullmatch(path.name), path) for path in (Path(run_dir) / "rollouts").glob("*.npz")]
    return sorted((int(match[1]), path) for match, path in found if match)


def write_rollouts(run_dir: str | Path, rollouts: SavedRollouts) -> Path:
    """Write the file of this step, the whole or nothing of it; an older one is replaced."""
    path = rollout_path(run_dir, rollouts.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    values = {f.name: getattr(rollouts, f.name) for f in fields(rollouts)}
    with partial.open("wb") as file:
        np.savez_compressed(file, **{name: value for name, value in values.items() if value is not None})
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


class RolloutWriter:
    """Writes files in a thread while training goes on: compressing 16,384 long rollouts takes a minute."""

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = run_dir
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollout file")
        self._under_way: Future[Path] | None = None

    def write(self, rollouts: SavedRollouts) -> None:
        """Begin with the file of this step when the one before it is complete; as :meth:`wait`."""
        self.wait()
        self._under_way = self._pool.submit(write_rollouts, self._run_dir, rollouts)

    def wait(self) -> None:
        """Return when nothing is being written.  Raises what the writing raised."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()


def read_rollouts(path: str | Path) -> SavedRollouts:
    """Undo :func:`write_rollouts`.  Nothing in the file is executed.

    Raises:
        ValueError: the file is damaged or is not one of these; the message names it.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            values = {name: data[name] for name in data.files}
            for name, value in values.items():
                if not isinstance(value, np.ndarray):  # numpy hands out as bytes what does not begin as an array
                    raise ValueError(f"{name} is no array")
            return SavedRollouts(
                step=int(values.pop("step")),
                progress=float(values.pop("progress")),
                **values,
            )
    except (OSError, ValueError, TypeError, KeyError, EOFError, *_ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a file of rollouts: {error}") from error
