"""Which files an input means and what they are, told by their first bytes: a name's ending proves nothing.

FF FF FF FF   Arrow IPC stream (HF save_to_disk, HF cache)      ARROW1   Arrow IPC file, Feather v2
PAR1          Parquet                                           [ or {   JSON list, JSON lines
gzip, bzip2, zstd, lz4 around JSON or an IPC stream are read through; everything else is refused by name.
"""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from data_tools.errors import DataError
from megatron_rest.data.prompt_files import MANIFEST_NAME

SUFFIXES = {".parquet", ".arrow", ".feather", ".jsonl", ".json", ".ndjson", ".gz", ".bz2", ".zst", ".lz4"}
# A compressed file may grow this much; JSON text grows 5 to 30 times, a bomb a thousand times.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 256 << 20
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_REFUSED = {
    b"FEA1": "is Feather v1 (deprecated): rewrite it with pyarrow.feather.write_feather(table, path, version=2)",
    b"version https://git-lfs": "is a Git LFS pointer, not data: run `git lfs pull`",
    b"PARE": "is an encrypted Parquet file: decrypt it first",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"7z\xbc\xaf": "is a 7-Zip archive: unpack it first",
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
    b"\x89HDF": "is an HDF5 file: convert it to Parquet or JSON lines",
    b"/annex/": "is a git-annex pointer, not data: run `git annex get`",
}


class Form(StrEnum):
    """How rows are stored."""

    IPC_STREAM = "Arrow IPC stream"
    IPC_FILE = "Arrow IPC file"
    PARQUET = "Parquet"
    JSON_LINES = "JSON lines"
    JSON_LIST = "JSON list"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input file."""

    path: Path
    name: str  # what the output and the messages call it: relative to the inputs' common folder
    form: Form
    compression: str = ""  # gzip, bz2, zstd, lz4 or nothing

    def open(self) -> IO[bytes]:
        """Bytes, decompressed; growth beyond :data:`MAX_EXPANSION` is refused."""
        return _open(self.path, self.compression)


class Growth:
    """Counts what comes out of a compressed file; beyond :data:`MAX_EXPANSION` it is refused."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._left = max(FREE_EXPANSION_BYTES, MAX_EXPANSION * path.stat().st_size)

    def add(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise DataError(
                f"{self._path} grows more than {MAX_EXPANSION} times when decompressed: if you trust it, unpack it"
                " (Parquet, Arrow: write it uncompressed)"
            )


class _Decompressed(io.RawIOBase):
    """pyarrow's decompressor as a Python file that counts what comes out."""

    def __init__(self, path: Path, compression: str) -> None:
        self._path = path
        self._growth = Growth(path)
        self._stream = pa.CompressedInputStream(pa.OSFile(str(path)), compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            raise DataError(f"{self._path} is damaged or truncated: {error}") from error
        self._growth.add(len(data))
        buffer[: len(data)] = data
        return len(data)


def _open(path: Path, compression: str) -> IO[bytes]:
    if not compression:
        return open(path, "rb")
    return io.BufferedReader(_Decompressed(path, compression), buffer_size=1 << 20)


def resolve_inputs(paths: Sequence[str | Path], *, split: str = "") -> list[Source]:
    """The files behind files, folders and globs, in a fixed order."""
    if not paths:
        raise DataError("no input given")
    files = [file for path in paths for file in _expand(Path(path), split)]
    absolute = [file.resolve() for file in files]
    for before, after in pairwise(sorted(absolute)):
        if before == after:
            raise DataError(f"{after} is given twice: its rows would count twice")
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    return [_source(file, str(full.relative_to(root))) for file, full in zip(files, absolute, strict=True)]


def _expand(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder(path, split)
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
    if not found:
        raise DataError(f"input {path} does not exist" + (" (no file matches)" if glob.has_magic(str(path)) else ""))
    return [file for match in found for file in _expand(Path(match), split)]


def _folder(path: Path, split: str) -> list[Path]:
    if (path / MANIFEST_NAME).is_file() and (path / "data-00000.arrow").is_file():
        raise DataError(f"{path} was written by `megatron-rest-data convert` already: point the trainer at it")
    if (path / "dataset_dict.json").is_file():
        splits = _names(path / "dataset_dict.json", "splits")
        if split and split not in splits:
            raise DataError(f"{path} has no split {split!r}, it has {', '.join(map(str, splits))}")
        return [file for name in splits if not split or name == split for file in _folder(_inside(path, name), "")]
    if (path / "state.json").is_file():
        state = _json(path / "state.json")
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise DataError(
                f"{path} was saved with an index mapping: load it, call flatten_indices() and save it again"
            )
        entries = _names(path / "state.json", "_data_files")
        return [_inside(path, entry.get("filename") if isinstance(entry, dict) else entry) for entry in entries]
    files = sorted(
        p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES and not p.name.startswith((".", "_"))
    )
    files = [p for p in files if p.name != "dataset_info.json"]
    if split:
        files = [p for p in files if p.stem == split or p.name.startswith((f"{split}-", f"{split}."))]
    if not files:
        raise DataError(
            f"{path} holds no data files"
            + (f" of split {split!r}" if split else "")
            + f" ({', '.join(sorted(SUFFIXES))})"
        )
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: not a JSON object")
    return value


def _names(path: Path, key: str) -> list[Any]:
    value = _json(path).get(key)
    if not isinstance(value, list) or not value:
        raise DataError(f"{path} is damaged: {key!r} is not a list of names")
    return value


def _inside(folder: Path, name: Any) -> Path:
    """A plain name below ``folder``: a manifest must not reach for files elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise DataError(f"{folder}: the file name {name!r} in its manifest is not a plain name")
    if not (folder / name).exists():
        raise DataError(f"{folder}: {name} is named in its manifest but missing")
    return folder / name


def _source(path: Path, name: str) -> Source:
    try:
        head = _head(path, "")
        compression = next((codec for magic, codec in _COMPRESSIONS.items() if head.startswith(magic)), "")
        form = _form(path, _head(path, compression) if compression else head)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if compression and form in (Form.IPC_FILE, Form.PARQUET):
        raise DataError(f"{path} is {form} inside {compression}: decompress it first (it needs random access)")
    return Source(path=path, name=name, form=form, compression=compression)


def _head(path: Path, compression: str) -> bytes:
    with _open(path, compression) as file:
        return file.read(4096)


def _form(path: Path, head: bytes) -> Form:
    if not head:
        raise DataError(f"{path} is empty")
    for magic, reason in _REFUSED.items():
        if head.startswith(magic):
            raise DataError(f"{path} {reason}")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive: unpack it first")
    if head.startswith(b"ARROW1"):
        return Form.IPC_FILE
    if head.startswith(b"\xff\xff\xff\xff"):
        return Form.IPC_STREAM
    if head.startswith(b"PAR1"):
        return Form.PARQUET
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return Form.JSON_LIST
    if text.startswith(b"{"):
        return Form.JSON_LINES
    raise DataError(
        f"{path} is in no known form (first bytes {head[:12]!r}): "
        "give Arrow IPC, Feather v2, Parquet, JSON lines or a JSON list"
    )
