"""Rows spelled otherwise, or damaged: right, refused or counted as a problem, and no call gets lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_tools import conversation
from data_tools.call_texts import Said
from data_tools.examples import examples_of
from tests.data_tools.mutations import SPELLINGS, random_calls, run, run_files, said, same


@pytest.mark.parametrize(("count", "seed"), [(500, 11), pytest.param(20_000, 12, marks=pytest.mark.extended)])
def test_no_row_loses_a_call(count: int, seed: int) -> None:
    outcomes, wrong = run(count, seed)
    assert wrong == []
    assert outcomes["right"] > 0.25 * count, "what is refused cannot be wrong: a good part must be read"
    assert outcomes["refused"] and outcomes["problem"]


@pytest.mark.parametrize(("count", "seed"), [(6, 21), pytest.param(200, 22, marks=pytest.mark.extended)])
def test_no_file_loses_a_call(count: int, seed: int, tokenizer_folder: Path, tmp_path: Path) -> None:
    outcomes, wrong = run_files(count, seed, tmp_path, tokenizer_folder)
    assert wrong == []
    assert outcomes["files converted"] + outcomes["files refused"] == count
    assert outcomes["rows right"] > count / 2


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_read_as_they_are(name: str) -> None:
    """Undamaged, with values that look like marks: none is refused."""
    chance = random.Random(name)
    for _ in range(6):
        calls = random_calls(chance, odd=False, most=1 if name in ("harmony", "react") else 3)
        row, _ = said(SPELLINGS[name](calls), random.Random(4))
        [example] = examples_of(row)
        assert same(example.calls, calls), SPELLINGS[name](calls)


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reader that keeps every text, calls get lost, and the harness says so."""
    monkeypatch.setattr(conversation, "read_text", lambda text, *_: Said(text, []))
    assert len(run(200, 11)[1]) > 20
