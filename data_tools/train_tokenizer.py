"""A byte-level BPE tokenizer trained on the rows themselves, saved as a Hugging Face tokenizer folder.

Control tokens (``<|im_start|>`` ...) are special.  The tags are single tokens but not special: decoding keeps them, and
the reward has to see them.  The same files give the same tokenizer, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_tools.encode import examples_of_row
from data_tools.errors import DataError, RowError
from data_tools.examples import Reading
from data_tools.readers import read_chunks, resolve_inputs

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAG_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<response>",
    "</response>",
    "<tool_response>",
    "</tool_response>",
)
SMALLEST_VOCABULARY = 256 + len(CONTROL_TOKENS) + len(TAG_TOKENS)  # every byte is a token
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def texts_of(paths: Sequence[str], *, reading: Reading | None = None, split: str = "") -> Iterator[str]:
    """Message and answer texts of the usable rows; DataError with the first reason where there is none."""
    reading = reading or Reading()
    usable, first = False, ""
    for chunk in read_chunks(resolve_inputs(paths, split=split)):
        for number, row in chunk.rows():
            try:
                examples = examples_of_row(row, reading)
            except RowError as error:
                first = first or f"{chunk.place(number)}: {error}"
                continue
            for example in examples:
                usable = True
                yield from (message["content"] for message in example.messages)
                yield example.ground_truth
    if not usable:
        raise DataError(f"no row is usable; the first: {first}" if first else "the inputs hold no rows")


def train_and_save(texts: Iterable[str], *, vocab_size: int, output: str | Path) -> int:
    """Train and save; returns the number of tokens (fewer than asked where the text has no more to merge)."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"--vocab-size is {vocab_size}, expected at least {SMALLEST_VOCABULARY} (bytes, control tokens, tags)"
        )
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise DataError("train-tokenizer needs the package tokenizers: pip install 'megatron_rest[train]'") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAG_TOKENS),
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_tags(texts), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAG_TOKENS])
    _save(tokenizer.to_str(pretty=True), Path(output))
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def _without_tags(texts: Iterable[str]) -> Iterator[str]:
    """Tags never reach the merges: they would spend vocabulary on pieces that are never used."""
    for text in texts:
        for tag in TAG_TOKENS:
            text = text.replace(tag, "\n")
        yield text


def _save(tokenizer_json: str, folder: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": CHATML,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
