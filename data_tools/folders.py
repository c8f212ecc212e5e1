"""Prepared folders as inputs of ``validate``, ``stats``, ``split`` and ``decontaminate``: read and rewritten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.encode import EncodedChunk, Refused
from data_tools.errors import DataError
from data_tools.writer import OutputFolder, sha256_file
from megatron_rest.data.prompt_files import MANIFEST_NAME, map_shard, read_manifest


def is_prepared(path: str | Path) -> bool:
    """Whether a path is a folder that ``convert`` wrote."""
    return (Path(path) / MANIFEST_NAME).is_file() and not (Path(path) / "state.json").exists()


class PreparedFolder:
    """Manifest and mapped batches of a prepared folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.manifest = read_manifest(self.path)
        except ValueError as error:
            raise DataError(str(error)) from error

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All record batches, in order, checked so that reading them is safe; nothing is copied."""
        for entry in self.manifest["outputs"]:
            try:
                for batch in map_shard(self.path, entry):
                    batch.validate(full=True)
                    yield batch
            except pa.ArrowInvalid as error:
                raise DataError(f"{self.path / entry['name']} is damaged: {error}") from error
            except ValueError as error:
                raise DataError(str(error)) from error

    @property
    def num_rows(self) -> int:
        """Rows according to the manifest."""
        return sum(entry["rows"] for entry in self.manifest["outputs"])


def write_subset(
    source: PreparedFolder,
    output: Path,
    chunks: Iterator[tuple[pa.RecordBatch, list[Refused]]],
    *,
    operation: dict[str, Any],
    overwrite: bool,
) -> dict[str, Any]:
    """Write some rows of a prepared folder as a new one; what an operation removes is listed in its quarantine file."""
    if output.exists() and not overwrite:
        raise DataError(f"{output} exists: give --overwrite to replace it, or another --output")
    derived: dict[str, Any] = {"manifest_sha256": sha256_file(source.path / MANIFEST_NAME), "operation": operation}
    if "derived_from" in source.manifest:  # a split of decontaminated data is decontaminated, too
        removed = source.manifest["counts"]["rows_quarantined"]
        derived["before"] = {**source.manifest["derived_from"], "rows_removed": removed}
    kept = ("format", "schema_version", "tokenizer", "options", "notes", "licence", "inputs", "written_by")
    identity = {**{key: source.manifest[key] for key in kept if key in source.manifest}, "derived_from": derived}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    metadata = {
        "megatron_rest.schema_version": str(source.manifest["schema_version"]),
        "megatron_rest.tokenizer": source.manifest["tokenizer"]["identity"],
        "megatron_rest.chat_template": source.manifest["tokenizer"]["chat_template_identity"],
    }
    rows_per_shard = source.manifest.get("options", {}).get("rows_per_shard", 1 << 16)
    with OutputFolder(
        output, fingerprint=fingerprint, metadata=metadata, rows_per_shard=rows_per_shard, resume=False
    ) as folder:
        for batch, removed in chunks:
            num = batch.num_rows + len(removed)
            folder.add(EncodedChunk(num, batch, removed, num_source=num))
        return folder.finish(identity, overwrite=overwrite)


def lists(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, values) of a list column, as views."""
    column = batch.column(name)
    return column.offsets.to_numpy(zero_copy_only=True), column.values.to_numpy(zero_copy_only=True)


def keep_rows(batch: pa.RecordBatch, keep: np.ndarray) -> pa.RecordBatch:
    """The rows where ``keep`` is True."""
    return batch.filter(pa.array(keep, pa.bool_()))
