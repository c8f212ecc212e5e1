"""Golden vector R2 with a real byte-level BPE: the policy samples "Search" as "S" + "earch".

The text has 24 tokens as the tokenizer would write it and 25 as it was sampled.  The published function tokenises the
text again and indexes the sampled ids with the result; labels here are made from the sampled tokens' own bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.reference_code import build_token_weight
from megatron_rest.regions import TokenRegion, label_regions, token_bytes_table
from megatron_rest.weighting import RestWeighting

TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>"]
TEXT = (
    '<think>ok</think>\n<tool_call>\n{"name": "Search Managers", "parameters": {"name": "Ann"}}\n</tool_call><|im_end|>'
)
# Words with a leading space, punctuation with the newlines behind it: how Qwen's and Llama-3's tokenizers cut.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    trained.add_special_tokens(TAGS)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=TAGS,
        show_progress=False,
    )
    words = TEXT
    for tag in TAGS:
        words = words.replace(tag, "\u0000")
    trained.train_from_iterator([*words.split("\u0000"), "earch"] * 2, trainer)
    return trained


@pytest.fixture(scope="module")
def sampled(tokenizer: Any) -> list[int]:
    """Ids of the text with the name's first word split as the tokenizer would not."""
    encoding = tokenizer.encode(TEXT)
    assert len(encoding.ids) == 24
    [at] = [i for i, token in enumerate(encoding.tokens) if token.endswith("Search")]
    halves = [tokenizer.token_to_id(part) for part in ("S", "earch")]
    assert None not in halves
    return [*encoding.ids[:at], *halves, *encoding.ids[at + 1 :]]


def test_labels_and_weights_follow_the_sampled_tokens(tokenizer: Any, sampled: list[int]) -> None:
    table = token_bytes_table(tokenizer)
    canonical = tokenizer.encode(TEXT).ids
    at = sampled.index(tokenizer.token_to_id("earch"))
    whole, split = (label_regions([table[i] for i in ids]) for ids in (canonical, sampled))
    assert b"".join(table[i] for i in sampled) == TEXT.encode()
    expected = [*whole[:at], TokenRegion.TOOL_NAME, *whole[at:]]
    assert split.tolist() == [int(region) for region in expected]
    assert split[at - 1 : at + 2].tolist() == [TokenRegion.TOOL_NAME] * 3, "S, earch, Managers"
    weights = RestWeighting.paper()(split, progress=0.0)
    raw = weights / weights[at] * 1.2
    np.testing.assert_allclose(raw[at - 1 : at + 2], 1.2, rtol=1e-6)
    np.testing.assert_allclose(raw[-2:], 1.0, rtol=1e-6, err_msg="closing tag and end of turn")
    np.testing.assert_allclose(raw[17:23], 0.6, rtol=1e-6, err_msg="the arguments")
    assert weights.mean() == pytest.approx(1.0, rel=1e-6)


def test_the_published_function_moves_every_later_weight_by_one(tokenizer: Any, sampled: list[int]) -> None:
    """Column R of the vector, in raw weights (its own tokenizer has one more argument token, so another mean)."""
    at = sampled.index(tokenizer.token_to_id("earch"))
    mask = torch.ones(1, len(sampled))
    weights = build_token_weight([TEXT], mask, lambda text: tokenizer.encode(text).offsets, step=0)[0].numpy()
    raw = weights / weights[0]
    assert raw[at - 1 : at + 2] == pytest.approx([1.2, 0.0, 0.0]), "half of the name, and nothing for the rest"
    assert raw[16:22] == pytest.approx([0.0, 0.6, 0.6, 0.6, 0.6, 0.0]), "the last sampled argument tokens get none"
    assert raw[22:25] == pytest.approx([1.0, 0.0, 0.0]), "the last brace has the closing tag's weight, the tag has 0"
