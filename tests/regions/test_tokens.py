"""The bytes of token ids of byte-level BPE tokenizers."""

from __future__ import annotations

import pytest

from megatron_rest.regions import token_bytes_table


class _Tokenizer:
    def __init__(self, vocab: dict[str, int], added: dict[str, int]) -> None:
        self._vocab, self._added = vocab, added

    def get_vocab(self) -> dict[str, int]:
        return self._vocab | self._added

    def get_added_vocab(self) -> dict[str, int]:
        return self._added


def test_spelled_and_added_tokens() -> None:
    table = token_bytes_table(_Tokenizer({"a": 0, "Ġb": 1, "Ċ": 2, "Ã": 3, "©": 4}, {"<｜end of turn｜>": 6, "Ġ": 7}))
    assert table == [b"a", b" b", b"\n", b"\xc3", b"\xa9", b"", "<｜end of turn｜>".encode(), "Ġ".encode()]


def test_a_sentencepiece_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="not spelled in byte-level BPE"):
        token_bytes_table(_Tokenizer({"▁the": 0}, {}))


def test_a_trained_byte_level_bpe_round_trips_any_text() -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = '<think>Größe ❄ 雪 \t\r\n</think>\n<tool_call>\n{"name": "f"}\n</tool_call> ' * 3
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    table = token_bytes_table(tokenizer)
    assert len(set(table)) == len(table)
    assert {bytes([b]) for b in range(256)} <= set(table)
    encoding = tokenizer.encode(text)
    assert b"".join(table[i] for i in encoding.ids) == text.encode()
    assert b"<think>" in [table[i] for i in encoding.ids]


def test_ids_that_no_token_has_are_empty_bytes() -> None:
    table = token_bytes_table(_Tokenizer({"a": 0, "b": 2}, {}))
    assert [table[i] for i in (0, 1, 2, 3, 151_935)] == [b"a", b"", b"b", b"", b""]
    assert table[1:] == [b"", b"b"] and len(table) == 3
