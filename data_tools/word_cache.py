"""Tokenise each distinct word once and remember it: most of a tool-use prompt has been seen before.

A batch of texts is one array of bytes: numpy marks where it may be cut, Arrow finds the distinct pieces and puts their
ids in the pieces' places.  Python sees distinct words only, the tokenizer new ones only.

Cutting a text is exact only where no pre-token can reach over the cut.  Two such places, for byte-level BPE with the
split patterns below, with ``x`` and ``y`` printable ASCII:

    "x\\n|y"    no pattern matches a newline followed by a character that is not space
    "x| y"     no pattern matches a character that is not space followed by a space

The look-ahead ``(?!\\S)`` never decides about a single space or newline between such characters.  For every other
tokenizer :func:`cuts_are_exact` says no and texts are encoded whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

MAX_WORDS = 1 << 18  # remembered words; when it is full, the memory starts anew
MAX_WORD_BYTES = 64  # longer words seldom repeat
WORDS_PER_TEXT = 64  # new words that the tokenizer gets at once
GROUP_BYTES = 8 << 20  # texts of one pass, whose scratch arrays are a few times as large
_ID_BYTES = 4
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
EXACT_PATTERNS = {_CL100K.format(digits=r"\p{N}"), _CL100K.format(digits=r"\p{N}{1,3}")}  # Qwen; Llama 3 and others


def cuts_are_exact(spec: dict[str, Any]) -> bool:
    """Whether a tokenizer (``tokenizer.json`` as a dict) gives the same ids for cut texts as for whole ones."""
    model, normalizer = spec.get("model") or {}, spec.get("normalizer")
    if model.get("type") != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if normalizer is not None and normalizer.get("type") != "NFC":
        return False
    for token in spec["added_tokens"]:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word") or len(token["content"].split()) != 1:
            return False
    return _splits_at_space(spec.get("pre_tokenizer") or {})


def _splits_at_space(pre: dict[str, Any]) -> bool:
    if pre.get("type") == "ByteLevel":
        return bool(pre.get("use_regex", True)) and not pre.get("add_prefix_space")
    if pre.get("type") != "Sequence" or len(pre.get("pretokenizers", [])) != 2:
        return False
    split, bytelevel = pre["pretokenizers"]
    return bool(
        split.get("type") == "Split"
        and split.get("pattern", {}).get("Regex") in EXACT_PATTERNS
        and str(split.get("behavior")).lower() == "isolated"
        and not split.get("invert")
        and bytelevel.get("type") == "ByteLevel"
        and not bytelevel.get("use_regex", True)
        and not bytelevel.get("add_prefix_space")
    )


def separator(spec: dict[str, Any]) -> str:
    """A control token that words can be joined by without changing their ids; empty if there is none.

    Control tokens are cut out before anything else happens, so what is between two of them is encoded by itself.  A
    token that another one contains, or whose beginning another one ends with, might not be found.
    """
    tokens = [token["content"] for token in spec["added_tokens"]]
    for token in spec["added_tokens"]:
        text = token["content"]
        beginnings = tuple(text[:length] for length in range(1, len(text)))
        if token.get("special") and not token.get("normalized"):
            others = [other for other in tokens if other != text]
            if not any(text in other or other.endswith(beginnings) for other in others):
                return str(text)
    return ""


class WordEncoder:
    """``encode(texts)`` with a memory of words; ``exact=False`` encodes whole texts."""

    def __init__(self, tokenizer: Any, *, exact: bool, separator: str = "") -> None:
        self._encode_batch = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        self._exact = exact
        self._separator = separator.encode()
        self._separator_id = tokenizer.token_to_id(separator) if separator else None
        self._memory: dict[bytes, bytes] = {}  # UTF-8 of a word -> its int32 ids

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, nothing added."""
        if not self._exact:
            return [np.asarray(ids, dtype=np.int32) for ids in self.encode_whole(texts)]
        return [ids for group in _groups(texts) for ids in self._encode_group(group)]

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by the tokenizer itself."""
        return [encoding.ids for encoding in self._encode_batch(list(texts), add_special_tokens=False)]

    def _encode_group(self, texts: list[bytes]) -> list[np.ndarray]:
        data = b"".join(texts)
        if not data:
            return [np.zeros(0, dtype=np.int32) for _ in texts]
        bounds = np.cumsum([0, *map(len, texts)])
        cuts = _cuts(np.frombuffer(data, dtype=np.uint8), bounds)
        buffers = [None, pa.py_buffer(cuts), pa.py_buffer(data)]
        words = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(cuts) - 1, buffers).dictionary_encode()
        ids = self._ids_of(words.dictionary.to_pylist()).take(words.indices)
        ends = ids.offsets.to_numpy()[np.searchsorted(cuts, bounds)]
        values = ids.values.to_numpy()
        return [values[start:end] for start, end in pairwise(ends)]

    def _ids_of(self, words: list[bytes]) -> pa.ListArray:
        """list<int32>: the ids of each word."""
        if len(self._memory) > MAX_WORDS:
            self._memory.clear()
        new = [word for word in words if word not in self._memory]
        self._memory.update(self._encode_new(new))
        found = [self._memory[word] for word in words]
        for word in new:
            if len(word) > MAX_WORD_BYTES:
                del self._memory[word]
        offsets = np.cumsum([0, *map(len, found)]) // _ID_BYTES
        return pa.ListArray.from_arrays(offsets.astype(np.int32), np.frombuffer(b"".join(found), dtype=np.int32))

    def _encode_new(self, words: list[bytes]) -> dict[bytes, bytes]:
        """Many words are one text with control tokens between: a call of the tokenizer costs more than a word."""
        joined = [word for word in words if self._separator and self._separator not in word]
        rows = [joined[start : start + WORDS_PER_TEXT] for start in range(0, len(joined), WORDS_PER_TEXT)]
        rows += [[word] for word in words if not self._separator or self._separator in word]
        encoded: dict[bytes, bytes] = {}
        for row, ids in zip(rows, self.encode_whole([self._separator.join(row).decode() for row in rows]), strict=True):
            array = np.array(ids, dtype=np.int32)
            ends = [*np.flatnonzero(array == self._separator_id), len(array)] if len(row) > 1 else [len(array)]
            starts = [0, *(end + 1 for end in ends[:-1])]
            data = array.tobytes()
            pieces = (data[a * _ID_BYTES : b * _ID_BYTES] for a, b in zip(starts, ends, strict=True))
            encoded.update(zip(row, pieces, strict=True))
        return encoded


def _groups(texts: Sequence[str]) -> Iterator[list[bytes]]:
    group, size = [], 0
    for text in texts:
        group.append(text.encode())
        size += len(group[-1])
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    yield group


def _cuts(data: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """int64 [words + 1]: where words start, and the end of the data.  No word reaches over a bound of two texts."""
    printable = data - np.uint8(ord("!")) <= ord("~") - ord("!")  # smaller bytes wrap around
    is_cut = np.zeros(len(data) + 1, dtype=bool)
    between = printable[:-2] & printable[2:]
    is_cut[1:-2] = (data[1:-1] == ord(" ")) & between
    is_cut[2:-1] |= (data[1:-1] == ord("\n")) & between
    is_cut[bounds] = True
    return np.flatnonzero(is_cut)
