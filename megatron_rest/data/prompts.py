"""Prompts for training: what ``megatron-rest-data convert`` wrote, memory-mapped, in an order that can be resumed.

The order is a pure function of (seed, epoch), so the only state of a run is its step number:

    dataset = PromptDataset.open("data/train", tokenizer_path="tok").select(max_prompt_tokens=1024)
    for step in range(first_step, last_step + 1):
        rows = prompts_for_step(len(dataset), 16, seed=1, step=step)     # the same on every rank
        mine = rows[dp_rank::dp_size]                                    # any split gives the same global batch

Opening maps the files and reads batch headers; no row is touched before it is asked for, and no buffer is copied.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_rest.data.prompt_files import (
    check_tokenizer,
    map_shard,
    offsets,
    read_manifest,
    token_counts,
)
from megatron_rest.types import PromptSample

__all__ = ["PromptDataset", "prompts_for_step"]


class PromptDataset:
    """Prompts with reference answers, indexed ``0 .. len - 1``; arrays are read-only views of the mapped files."""

    def __init__(
        self, batches: list[pa.RecordBatch], *, rows: np.ndarray | None = None, num_left_out: int = 0, name: str = ""
    ) -> None:
        """Use :meth:`open`.  ``rows`` are the data set's rows to show, all by default."""
        self._batches = batches
        self._ends = list(accumulate(batch.num_rows for batch in batches))
        self._rows = np.arange(self._ends[-1] if batches else 0) if rows is None else rows
        self._name = name
        self.num_left_out = num_left_out
        """Prompts that :meth:`select` left out because they or their answers are too long."""

    @classmethod
    def open(cls, path: str | Path, *, tokenizer_path: str | None = None) -> PromptDataset:
        """Map the folder ``path``; with ``tokenizer_path``, refuse it if another tokenizer or template made it."""
        folder = Path(path)
        manifest = read_manifest(folder)
        if tokenizer_path is not None:
            check_tokenizer(folder, manifest, tokenizer_path)
        batches = [batch for entry in manifest["outputs"] for batch in map_shard(folder, entry)]
        return cls(batches, name=str(folder))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PromptSample:
        batch, row = self._locate(index)
        return PromptSample(
            prompt_id=self._text(batch, "prompt_id", row),
            token_ids=self._ids(batch, "prompt_token_ids", row),
            ground_truth=self._text(batch, "ground_truth", row),
            index=int(self._rows[index]),
            messages_json=self._text(batch, "messages", row),
            tools_json=self._text(batch, "tools", row),
            metadata_json=self._text(batch, "metadata", row),
        )

    def reference_token_ids(self, index: int) -> np.ndarray:
        """int32 [A]: the reference answer, end of turn included."""
        batch, row = self._locate(index)
        return self._ids(batch, "answer_token_ids", row)

    def record(self, index: int) -> dict[str, Any]:
        """Every column of one prompt as plain values, for people and reports."""
        batch, row = self._locate(index)
        one = batch.slice(row, 1)
        try:
            one.validate(full=True)
        except pa.ArrowInvalid as error:
            raise self._damaged(row) from error
        return dict(one.to_pylist()[0])

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int64 [len]: tokens of each prompt."""
        return self._lengths("prompt_token_ids")

    @property
    def answer_lengths(self) -> np.ndarray:
        """int64 [len]: tokens of each reference answer, end of turn included."""
        return self._lengths("answer_token_ids")

    def _lengths(self, column: str) -> np.ndarray:
        return token_counts(self._batches, column)[self._rows]

    def select(
        self, *, max_prompt_tokens: int, max_answer_tokens: int | None = None, max_prompts: int = 0
    ) -> PromptDataset:
        """Prompts of at most ``max_prompt_tokens``, the first ``max_prompts`` of them (0 = all).  Nothing is cut.

        ``max_answer_tokens`` leaves out prompts whose reference answer is longer (None = any length).
        """
        if max_prompt_tokens < 1 or max_prompts < 0:
            raise ValueError(f"max_prompt_tokens={max_prompt_tokens} must be >= 1 and max_prompts={max_prompts} >= 0")
        lengths = self.prompt_lengths
        fits = lengths <= max_prompt_tokens
        if len(self) and not fits.any():
            raise ValueError(
                f"{self._name}: all {len(self)} prompts are longer than max_prompt_tokens={max_prompt_tokens} "
                f"(the shortest has {int(lengths.min())}): raise data.max_prompt_tokens or prepare shorter prompts"
            )
        if max_answer_tokens is not None:
            fits &= self.answer_lengths <= max_answer_tokens
            if len(self) and not fits.any():
                raise ValueError(f"{self._name}: no fitting prompt has an answer of at most {max_answer_tokens} tokens")
        fitting = self._rows[fits]
        left_out = self.num_left_out + len(self) - len(fitting)
        rows = fitting[:max_prompts] if max_prompts else fitting
        return PromptDataset(self._batches, rows=rows, num_left_out=left_out, name=self._name)

    def only(self, indices: list[int], *, left_out: int) -> PromptDataset:
        """These prompts, in this order; ``left_out`` others are counted in :attr:`num_left_out`."""
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return PromptDataset(self._batches, rows=rows, num_left_out=self.num_left_out + left_out, name=self._name)

    def _ids(self, batch: pa.RecordBatch, name: str, row: int) -> np.ndarray:
        column = batch.column(name)
        return self._slice(offsets(column), column.values.to_numpy(zero_copy_only=True), row)

    def _text(self, batch: pa.RecordBatch, name: str, row: int) -> str:
        column = batch.column(name)
        _, offsets, data = column.buffers()
        starts = np.frombuffer(offsets, dtype=np.int32)[column.offset :]
        text = self._slice(starts, np.frombuffer(data or b"", dtype=np.uint8), row).tobytes()
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(row) from error

    def _slice(self, offsets: np.ndarray, values: np.ndarray, row: int) -> np.ndarray:
        """A view of one row's values.  pyarrow trusts the offsets of a file; a flipped bit would read elsewhere."""
        start, end = int(offsets[row]), int(offsets[row + 1])
        if not 0 <= start <= end <= len(values):
            raise self._damaged(row)
        return values[start:end]

    def _damaged(self, row: int) -> ValueError:
        return ValueError(f"{self._name}: row {row} of a batch is damaged: run `megatron-rest-data validate` on it")

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"prompt {index} of {len(self._rows)} in {self._name}")
        row = int(self._rows[index])
        number = bisect_right(self._ends, row)
        return self._batches[number], row - (self._ends[number - 1] if number else 0)


def prompts_for_step(num_prompts: int, prompts_per_step: int, *, seed: int, step: int, draw: int = 0) -> list[int]:
    """Prompts of step ``step`` (from 1).  Consecutive steps walk through one permutation per epoch and lose none.

    Extra draws of a step (``draw`` from 1) walk through permutations of their own.
    A step that crosses the border of an epoch may hold a prompt twice (the last of one epoch, the first of the next).
    """
    if num_prompts < 1 or prompts_per_step < 1 or step < 1:
        raise ValueError(
            f"num_prompts={num_prompts}, prompts_per_step={prompts_per_step} and step={step} must all be at least 1"
        )
    seed = _mix_int(seed) ^ draw if draw else seed
    start = (step - 1) * prompts_per_step
    order: list[int] = []
    while len(order) < prompts_per_step:
        epoch, offset = divmod(start + len(order), num_prompts)
        order += _permutation(num_prompts, seed, epoch)[offset : offset + prompts_per_step - len(order)].tolist()
    return order


@lru_cache(maxsize=2)
def _permutation(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    """Prompts sorted by a hash: unlike numpy's generators it is the same in every version."""
    start = np.uint64(_mix_int(_mix_int(seed) ^ epoch))
    keys = _mix(np.arange(num_prompts, dtype=np.uint64) ^ start)
    permutation = np.argsort(keys, kind="stable")
    permutation.flags.writeable = False
    return permutation


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function: a bijection of 64-bit words that scatters neighbours."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(value: int) -> int:
    return int(_mix(np.array([value & (2**64 - 1)], dtype=np.uint64))[0])
