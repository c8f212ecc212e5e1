"""Token id -> bytes for byte-level BPE tokenizers (Qwen, Llama 3, GPT-2, DeepSeek), without importing any of them.

A byte-level vocabulary spells every byte as one printable character (GPT-2's table); an added token (``<think>``,
``<|im_end|>``) is spelled as itself.  Undoing the spelling token by token gives the exact bytes that were sampled,
which ``decode`` does not: it replaces half characters and may clean up spaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["TokenBytes", "token_bytes_table"]


class TokenBytes(list[bytes]):
    """Bytes by token id; an id that no token has is empty bytes, as transformers decodes it.

    Models have more rows than their tokenizer has tokens (Qwen: 151,936 and some 151,660), and such an id can be
    sampled: it is a bad answer, not an error.
    """

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice) and index >= len(self):
            return b""
        return super().__getitem__(index)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in table.values())
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def token_bytes_table(tokenizer: Any) -> TokenBytes:
    """The bytes of every token id: ``b"".join(table[i] for i in ids)`` is what the model wrote.

    Args:
        tokenizer: anything with ``get_vocab() -> {token: id}`` that includes the added tokens, and, where there is one,
            ``get_added_vocab() -> {token: id}`` (Hugging Face tokenizers have both).

    Returns:
        One entry per id up to the largest known one; ``b""`` for ids that the vocabulary leaves out and beyond.

    Raises:
        ValueError: a token is not byte-level spelled (a SentencePiece vocabulary, say).
    """
    vocab: Mapping[str, int] = tokenizer.get_vocab()
    added: Mapping[str, int] = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    table = [b""] * (max([*vocab.values(), *added.values()], default=-1) + 1)
    for token, token_id in vocab.items():
        if token not in added:
            table[token_id] = _spelled_bytes(token, token_id)
    for token, token_id in added.items():
        table[token_id] = token.encode()
    return TokenBytes(table)


def _spelled_bytes(token: str, token_id: int) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError as error:
        if token.startswith("<") and token.endswith(">"):  # a special token that the tokenizer does not list as added
            return token.encode()
        raise ValueError(
            f"token {token_id} ({token!r}) is not spelled in byte-level BPE: {error.args[0]!r} stands for no byte. "
            "Only byte-level vocabularies have exact bytes per token; build the table for this tokenizer by hand"
        ) from None
