"""Mutated inputs of every kind are taken or refused by name; ``python -m tests.fuzz`` runs more of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, fuzz

CASES = {"Hugging Face folders": 60, "answers of a model": 100}
FACTOR = int(os.environ.get("MEGATRON_REST_FUZZ", "1"))  # times as many cases


@pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.extended)])
@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_are_taken_or_refused_by_name(name: str, share: float, tmp_path: Path) -> None:
    outcome = fuzz(TARGETS[name], tmp_path, cases=int(share * CASES.get(name, 200)) * FACTOR, seed=1)
    assert outcome.unexpected == ()
    assert outcome.taken + outcome.refused == outcome.cases
    assert outcome.taken > 0
    assert outcome.refused > 0 or not TARGETS[name].refusals
