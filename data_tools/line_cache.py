"""Tokenise lines and words once and remember them: most of a tool-use prompt has been seen before.

Cutting a text is exact only where no pre-token can reach over the cut.  Two such places, for byte-level BPE with the
split patterns below, with ``x`` and ``y`` printable ASCII:

    "x\\n|y"    no pattern matches a newline followed by a character that is not space
    "x| y"     no pattern matches a character that is not space followed by a space

The look-ahead ``(?!\\S)`` never decides about a single space or newline between such characters.  For every other
tokenizer :func:`cuts_are_exact` says no and texts are encoded whole.  The tokenizer itself then sees new words only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

MAX_LINES = 1 << 15  # remembered lines; when it is full, the memory starts anew
MAX_LINE_CHARACTERS = 1024  # longer lines seldom repeat
MAX_WORDS = 1 << 18
MAX_WORD_CHARACTERS = 64
_LINE_CUT = re.compile(r"(?<=[!-~]\n)(?=[!-~])")
_WORD_CUT = re.compile(r"(?<=[!-~])(?= [!-~])")
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
    """``encode(texts)`` with a memory of lines and words; ``exact=False`` encodes whole texts."""

    def __init__(self, tokenizer: Any, *, exact: bool) -> None:
        self._encode_batch = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        self._exact = exact
        self._lines: dict[str, np.ndarray] = {}
        self._words: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, nothing added."""
        if not self._exact:
            return [np.asarray(ids, dtype=np.int32) for ids in self.encode_whole(texts)]
        pieces = [_LINE_CUT.split(text) for text in texts]
        if len(self._lines) > MAX_LINES:
            self._lines.clear()
        new = list({line: None for lines in pieces for line in lines if line not in self._lines})
        self._lines.update(zip(new, self._encode_lines(new), strict=True))
        encoded = [_join([self._lines[line] for line in lines]) for lines in pieces]
        _forget_long(self._lines, new, MAX_LINE_CHARACTERS)
        return encoded

    def _encode_lines(self, lines: Sequence[str]) -> list[np.ndarray]:
        pieces = [_words(line) for line in lines]
        if len(self._words) > MAX_WORDS:
            self._words.clear()
        new = list(set(chain.from_iterable(pieces)) - self._words.keys())
        self._words.update(zip(new, self.encode_whole(new), strict=True))
        ids_of = self._words.__getitem__
        encoded = [np.array([*chain.from_iterable(map(ids_of, words))], dtype=np.int32) for words in pieces]
        _forget_long(self._words, new, MAX_WORD_CHARACTERS)
        return encoded

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by the tokenizer itself."""
        return [encoding.ids for encoding in self._encode_batch(list(texts), add_special_tokens=False)]


def _words(line: str) -> list[str]:
    """The line cut before every single space between printable ASCII; mostly that is every space, which is fast."""
    body = line.removesuffix("\n")
    if body.isascii() and body.isprintable() and "  " not in body and body.strip(" ") == body:
        return line.replace(" ", "\0 ").split("\0")
    return _WORD_CUT.split(line)


def _forget_long(memory: dict[str, Any], new: Sequence[str], most_characters: int) -> None:
    for text in new:
        if len(text) > most_characters:
            del memory[text]


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
