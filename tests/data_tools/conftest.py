"""A small tokenizer and the sample rows, made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.chat import ChatTokenizer
from data_tools.train_tokenizer import texts_of, train_and_save

SAMPLES = Path(__file__).parents[2] / "data_tools" / "samples"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_and_save(texts_of([str(SAMPLES / "test.parquet")]), vocab_size=600, output=folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def sft_rows() -> list[dict[str, Any]]:
    return json.loads((SAMPLES / "rlla_sft.json").read_text())
