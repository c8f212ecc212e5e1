"""Which files an input means and what they are, told by their first bytes: a name's ending proves nothing.

FF FF FF FF   Arrow IPC stream (HF save_to_disk, HF cache)      ARROW1   Arrow IPC file, Feather v2
PAR1          Parquet                                           [ or {   JSON list, JSON lines
gzip, bzip2, zstd, lz4 around JSON or an IPC stream are read through; everything else is refused by name.
"""

from __future__ import annotations

import glob
import io
import json
import lzma
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from data_tools.errors import DataError
from megatron_rest.data.prompt_files import MANIFEST_NAME

SUFFIXES = {".parquet", ".arrow", ".feather", ".jsonl", ".json", ".ndjson", ".gz", ".bz2", ".xz", ".zst", ".lz4"}
# A compressed file may grow this much; JSON text grows 5 to 30 times, a bomb a thousand times.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 256 << 20
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xfd7zXZ\x00": "xz",
}
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
    JSON_OBJECTS = "JSON objects over several lines"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input file."""

    path: Path
    name: str  # what the output and the messages call it: relative to the inputs' common folder
    form: Form
    compression: str = ""  # gzip, bz2, xz, zstd, lz4 or nothing

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


def _stream(raw: pa.NativeFile, compression: str) -> Any:
    return lzma.LZMAFile(raw) if compression == "xz" else pa.CompressedInputStream(raw, compression)


class _Decompressed(io.RawIOBase):
    """pyarrow's decompressor as a Python file that counts what comes out."""

    def __init__(self, path: Path, compression: str) -> None:
        self._path = path
        self._growth = Growth(path)
        raw = pa.OSFile(str(path))
        self._stream: Any = _stream(raw, compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise DataError(f"{self._path} is damaged or truncated: {error}") from error
        self._growth.add(len(data))
        buffer[: len(data)] = data
        return len(data)


def _open(path: Path, compression: str) -> IO[bytes]:
    if not compression:
        return open(path, "rb")
    return io.BufferedReader(_Decompressed(path, compression), buffer_size=1 << 20)


def resolve_inputs(paths: Sequence[str | Path], *, split: str = "") -> list[Source]:
    """The files behind files, folders and globs, in a fixed order.  Empty parts of folders are no files of it."""
    if not paths:
        raise DataError("no input given")
    found = [_expand(Path(path), split) for path in paths]
    files = list(chain.from_iterable(found))
    absolute = [file.resolve() for file in files]
    for before, after in pairwise(sorted(absolute)):
        if before == after:
            raise DataError(f"{after} is given twice: its rows would count twice")
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    named = [str(full.relative_to(root)) for full in absolute]
    whole = [_source(file, name) for file, name in zip(files, named, strict=True)]
    sources = [source for source in whole if source is not None]
    empty = [str(path) for path, source in zip(files, whole, strict=True) if source is None]
    if empty and (len(files) == len(paths) or not sources):
        raise DataError(f"{empty[0]} is empty")
    return sources


def _expand(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder(path, split)
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
    if not found:
        raise DataError(f"input {path} does not exist" + _why_missing(path))
    return [file for match in found for file in _expand(Path(match), split)]


def _why_missing(path: Path) -> str:
    if glob.has_magic(str(path)):
        return " (no file matches)"
    if _HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return f" (a name on the hub? `hf download --repo-type dataset {path} --local-dir DIR`, then give DIR)"
    return ""


_HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")
ALL_SPLITS = "all"
_SPLIT = re.compile(
    r"(?:^|[-._=/ ])(train(?:ing)?|test(?:ing)?|validation|valid|val|dev|eval(?:uation)?)(?=$|[-._/ ]|\d)"
)
# What lies beside data in folders of models, hubs, tables and caches.
_NO_DATA = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "package.json"),
    *(MANIFEST_NAME, "model.safetensors.index.json", "vocab.json", "added_tokens.json", "preprocessor_config.json"),
}
_CACHES = ("cache-", "tmp")  # of `datasets.map` and of writers that were stopped


def _folder(path: Path, split: str) -> list[Path]:
    if (path / MANIFEST_NAME).is_file() and (path / "data-00000.arrow").is_file():
        raise DataError(f"{path} was written by `megatron-rest-data convert` already: point the trainer at it")
    if (path / "dataset_dict.json").is_file():
        splits = [str(name) for name in _names(path / "dataset_dict.json", "splits")]
        _check_splits(path, splits, split)
        wanted = [name for name in splits if split in ("", ALL_SPLITS, name)]
        return [file for name in wanted for file in _folder(_inside(path, name), "")]
    if (path / "state.json").is_file():
        state = _json(path / "state.json")
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise DataError(
                f"{path} was saved with an index mapping: load it, call flatten_indices() and save it again"
            )
        entries = _names(path / "state.json", "_data_files")
        return [_inside(path, entry.get("filename") if isinstance(entry, dict) else entry) for entry in entries]
    if (path / "_delta_log").is_dir():
        files = _delta_files(path)
    elif (path / "metadata").is_dir() and any((path / "metadata").glob("*.metadata.json")):
        raise DataError(f"{path} is an Iceberg table: export it, for example `table.scan().to_arrow()` to Parquet")
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p.relative_to(path)))
    of_split = {file: _split_of(file.relative_to(path)) for file in files}
    splits = sorted({name for name in of_split.values() if name})
    if split and split != ALL_SPLITS:
        files = [
            file for file, name in of_split.items() if split == name or _is_of_split(file.relative_to(path), split)
        ]
    else:
        _check_splits(path, splits, split)
    if not files:
        raise DataError(
            f"{path} holds no data files"
            + (f" of split {split!r}" + (f", it has {', '.join(splits)}" if splits else "") if split else "")
            + f" ({', '.join(sorted(SUFFIXES))})"
        )
    return files


def _check_splits(path: Path, splits: list[str], split: str) -> None:
    """Test rows must not get into training by accident."""
    if split and split != ALL_SPLITS:
        if split not in splits:
            raise DataError(f"{path} has no split {split!r}, it has {', '.join(splits)}")
    elif len(splits) > 1 and not split:
        first = next((name for name in splits if name.startswith("train")), splits[0])
        raise DataError(
            f"{path} has the splits {', '.join(splits)}: say which, --split {first}, or --split {ALL_SPLITS}"
        )


def _is_data(name: Path) -> bool:
    if name.suffix not in SUFFIXES or name.name in _NO_DATA or name.name == "quarantine.jsonl":
        return False
    if any(part.startswith((".", "_")) for part in name.parts):
        return False
    return not (name.suffix == ".arrow" and (name.name.startswith(_CACHES) or "indices" in name.name))


def _split_of(name: Path) -> str:
    """The split that a file's folders or its name say, by the hub's conventions; empty: none."""
    for part in (*reversed(name.parts[:-1]), name.name.partition(".")[0]):
        if found := _SPLIT.search(part.lower()):
            return found[1]
    return ""


def _is_of_split(name: Path, split: str) -> bool:
    return name.stem == split or name.name.startswith((f"{split}-", f"{split}.")) or split in name.parts[:-1]


def _delta_files(path: Path) -> list[Path]:
    """The files of a Delta table's newest version: its folder also holds those of earlier ones."""
    logs = sorted((path / "_delta_log").glob("*.json"))
    if not logs or logs[0].stem.strip("0"):
        raise DataError(f"{path} is a Delta table whose log begins with a checkpoint: write it as Parquet first")
    live: dict[str, None] = {}
    for log in logs:
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                action = json.loads(line)
            except ValueError as error:
                raise DataError(f"{log} is damaged: {error}") from error
            added, removed = action.get("add"), action.get("remove")
            if added and added.get("deletionVector"):
                raise DataError(f"{path} is a Delta table with deleted rows in its files: write it as Parquet first")
            if added:
                live[str(added["path"])] = None
            if removed:
                live.pop(str(removed["path"]), None)
    files = [path / name for name in live]
    for file in files:
        if ".." in file.relative_to(path).parts or not file.is_file():
            raise DataError(f"{path}: {file.name} is named in its log but missing")
    return sorted(files)


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


def _source(path: Path, name: str) -> Source | None:
    """The file as what it is; None: it is empty, as parts of folders may be."""
    try:
        head = _head(path, "")
        compression = next((codec for magic, codec in _COMPRESSIONS.items() if head.startswith(magic)), "")
        inner = _head(path, compression) if compression else head
        if not inner.strip():
            return None
        form = _form(path, inner)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if compression and form in (Form.IPC_FILE, Form.PARQUET):
        raise DataError(f"{path} is {form} inside {compression}: decompress it first (it needs random access)")
    return Source(path=path, name=name, form=form, compression=compression)


def _head(path: Path, compression: str) -> bytes:
    with _open(path, compression) as file:
        return file.read(4096)


def _form(path: Path, head: bytes) -> Form:
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
        first, newline, _ = text.partition(b"\n")
        return Form.JSON_OBJECTS if newline and first.rstrip().endswith((b"{", b"[", b",")) else Form.JSON_LINES
    raise DataError(
        f"{path} is in no known form (first bytes {head[:12]!r}): "
        "give Arrow IPC, Feather v2, Parquet, JSON lines or a JSON list"
    )
