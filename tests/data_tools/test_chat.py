"""Tokenizer folders: ids equal to those of transformers, byte-exact offsets, identities that tell tokenizers apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.chat import ChatTokenizer
from data_tools.errors import DataError, RowError
from data_tools.examples import normalise
from data_tools.train_tokenizer import TAG_TOKENS, texts_of, train_and_save
from data_tools.word_cache import WordEncoder, cuts_are_exact, separator
from megatron_rest.data.prompt_files import chat_template, template_identity, tokenizer_identity
from tests.data_tools.conftest import SAMPLES


def test_ids_are_those_of_transformers(tokenizer: ChatTokenizer, sft_rows: list[dict[str, Any]]) -> None:
    import transformers

    reference = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)
    for row in sft_rows[:40]:
        example = normalise(row)
        expected = reference.apply_chat_template(
            example.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        prompt, answer = tokenizer.encode([tokenizer.render(example.messages), example.ground_truth])
        assert prompt.tolist() == expected
        assert answer.tolist() == reference(example.ground_truth, add_special_tokens=False)["input_ids"]
        assert reference.decode(answer.tolist(), skip_special_tokens=True) == example.ground_truth, "tags must survive"
    assert tokenizer.end_of_turn_id == reference.eos_token_id


def test_identity_survives_saving_again(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    import transformers

    transformers.AutoTokenizer.from_pretrained(tokenizer.folder).save_pretrained(tmp_path)
    assert tokenizer_identity(tmp_path) == tokenizer.identity
    assert template_identity(tmp_path) == tokenizer.template_identity
    assert ChatTokenizer(tmp_path).encode(["<think> hé"])[0].tolist() == tokenizer.encode(["<think> hé"])[0].tolist()


def test_identity_tells_tokenizers_and_templates_apart(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    shutil.copytree(tokenizer.folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(chat_template(tokenizer.folder) + " ")
    assert tokenizer_identity(tmp_path / "t") == tokenizer.identity
    assert template_identity(tmp_path / "t") != tokenizer.template_identity
    spec = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    spec["model"]["merges"].pop()
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(spec))
    assert tokenizer_identity(tmp_path / "t") != tokenizer.identity


def test_training_is_deterministic_and_tags_are_single_tokens(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    train_and_save(texts_of([str(SAMPLES / "test.parquet")]), vocab_size=600, output=tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer.folder / name).read_bytes()
    assert tokenizer.vocab_size == 600
    assert [len(ids) for ids in tokenizer.encode(TAG_TOKENS)] == [1] * len(TAG_TOKENS)
    with pytest.raises(DataError, match="at least 267"):
        train_and_save(["x"], vocab_size=100, output=tmp_path)


TEXT = st.lists(
    st.sampled_from(["\n", "\n\n", " \n", " ", "  ", "5", "a", "Z9", " the", "'s", "}", '{"x":',
                     "é", "日本", "\u0301", "\u200b", "\x85", "\x1c",
                     "\t", "\r\n", "<think>", "</tool_call>", "<|im_end|>", "<|endoftext|>", "🙂", "!"]),
    max_size=30,
).map("".join)  # fmt: skip


TEXTS = st.lists(st.one_of(TEXT, st.text(max_size=40)), max_size=4)
few = settings(max_examples=30, deadline=None)
many = settings(max_examples=500, deadline=None)


def assert_cut_is_whole(tokenizer: ChatTokenizer, texts: list[str]) -> None:
    words = tokenizer._words
    assert words._exact
    assert [ids.tolist() for ids in words.encode(texts)] == words.encode_whole(texts)


@few
@given(texts=TEXTS)
def test_cut_texts_encode_like_whole_ones(tokenizer: ChatTokenizer, texts: list[str]) -> None:
    assert_cut_is_whole(tokenizer, texts)


@pytest.mark.extended
@many
@given(texts=TEXTS)
def test_more_cut_texts_encode_like_whole_ones(tokenizer: ChatTokenizer, texts: list[str]) -> None:
    assert_cut_is_whole(tokenizer, texts)


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@few
@given(text=TEXT)
def test_cut_texts_encode_like_whole_ones_with_qwens_pattern(tokenizer: ChatTokenizer, text: str) -> None:
    assert_cut_is_whole_for_qwen(tokenizer, text)


@pytest.mark.extended
@many
@given(text=TEXT)
def test_more_cut_texts_encode_like_whole_ones_with_qwens_pattern(tokenizer: ChatTokenizer, text: str) -> None:
    assert_cut_is_whole_for_qwen(tokenizer, text)


def assert_cut_is_whole_for_qwen(tokenizer: ChatTokenizer, text: str) -> None:
    import tokenizers

    spec = json.loads((tokenizer.folder / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "NFC"}
    split = {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False}
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytelevel]}
    assert cuts_are_exact(spec)
    for joined in ("", separator(spec)):
        words = WordEncoder(tokenizers.Tokenizer.from_str(json.dumps(spec)), exact=True, separator=joined)
        assert words.encode([text])[0].tolist() == words.encode_whole([text])[0]


def test_separator_cannot_be_mistaken(tokenizer: ChatTokenizer) -> None:
    assert separator(tokenizer._spec) == "<|endoftext|>"
    for texts in (["<a>"], ["<a>", "<a>b"], ["<a>", "b<"], ["<a>", "b<a"], ["<a>", ">"]):
        tokens = [{"content": text, "special": text == "<a>"} for text in texts]
        assert separator({"added_tokens": tokens}) == ("<a>" if texts in (["<a>"], ["<a>", ">"]) else "")
    assert separator({"added_tokens": [{"content": "<a>", "special": True, "normalized": True}]}) == ""


def test_unknown_tokenizers_are_encoded_whole(tokenizer: ChatTokenizer) -> None:
    spec = json.loads((tokenizer.folder / "tokenizer.json").read_text())
    for change in (
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {**spec["model"], "byte_fallback": True}},
        {"added_tokens": [{"content": "x", "rstrip": True}]},
        {"added_tokens": [{"content": "<tool call>"}]},
    ):
        assert not cuts_are_exact({**spec, **change})


def test_token_starts_are_byte_exact(tokenizer: ChatTokenizer) -> None:
    text = "<think> héllo 🙂 日本 </think>\n<response> ok </response>"
    (ids,) = tokenizer.encode([text])
    starts = tokenizer.token_starts(ids, text)
    assert starts is not None
    assert starts[-1] == len(text.encode())
    at_tag = int(np.searchsorted(starts, text.encode().index(b"</think>")))
    assert tokenizer.decode([ids[at_tag]]) == "</think>"
    assert tokenizer.token_starts(ids, text + "!") is None


def test_control_tokens_in_data_are_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(RowError, match=r"control token <\|im_end\|>"):
        tokenizer.render([{"role": "user", "content": "hi <|im_end|>"}])


def test_bad_folders_are_named(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        ChatTokenizer(tmp_path)
    shutil.copy(tokenizer.folder / "tokenizer.json", tmp_path)
    with pytest.raises(DataError, match="no chat template"):
        ChatTokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="does not compile"):
        ChatTokenizer(tmp_path)
    for text, fault in (
        ("{", "is damaged"),
        ('{"model": {}, "added_tokens": 3}', "no list"),
        ('{"model": {}}', "does not load"),
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(DataError, match=fault):
            ChatTokenizer(tmp_path)
