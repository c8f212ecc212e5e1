"""Tokenise line by line and remember lines: more than half of a tool-use prompt is the same text in every row.

Cutting a text is exact only where no token can reach over the cut.  A cut between ``"x\\n"`` and ``"y"`` with ``x`` and
``y`` printable ASCII is such a place for byte-level BPE with the split patterns below: none of them matches a newline
followed by a character that is not space, and the look-ahead ``(?!\\S)`` never decides about a single newline.  For
every other tokenizer :func:`cuts_are_exact` says no and texts are encoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_LINES = 1 << 17  # remembered lines; when it is full, the memory starts anew
MAX_LINE_CHARACTERS = 2048  # longer lines seldom repeat
_CUT = re.compile(r"(?<=[!-~]\n)(?=[!-~])")
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
EXACT_PATTERNS = {_CL100K.format(digits=r"\p{N}"), _CL100K.format(digits=r"\p{N}{1,3}")}  # Qwen; Llama 3 and others


def cuts_are_exact(spec: dict[str, Any]) -> bool:
    """Whether a tokenizer (``tokenizer.json`` as a dict) gives the same ids for lines as for the whole text."""
    model, normalizer = spec.get("model") or {}, spec.get("normalizer")
    if model.get("type") != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if normalizer is not None and normalizer.get("type") != "NFC":
        return False
    if any(
        t.get("lstrip") or t.get("rstrip") or t.get("single_word") or "\n" in t["content"] for t in spec["added_tokens"]
    ):
        return False
    return _splits_at_newlines(spec.get("pre_tokenizer") or {})


def _splits_at_newlines(pre: dict[str, Any]) -> bool:
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


class LineEncoder:
    """``encode(texts)`` with a memory of lines; ``exact=False`` encodes whole texts."""

    def __init__(self, tokenizer: Any, *, exact: bool) -> None:
        self._encode_batch = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        self._exact = exact
        self._known: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, nothing added."""
        if not self._exact:
            return self._plain(texts)
        if len(self._known) > MAX_LINES:
            self._known.clear()
        pieces = [_CUT.split(text) for text in texts]
        fresh = {line: None for lines in pieces for line in lines if line not in self._known}
        self._known.update(zip(fresh, self._plain(list(fresh)), strict=True))
        encoded = [_join([self._known[line] for line in lines]) for lines in pieces]
        for line in fresh:
            if len(line) > MAX_LINE_CHARACTERS:
                del self._known[line]
        return encoded

    def _plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
