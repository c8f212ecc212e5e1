"""Mutated real files: a clear error or rows that add up, never a crash.  ``fuzzing.py`` runs more cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_tools.fuzzing import fuzz
from tests.data_tools.test_forms import WRITERS

FORMS = [
    "stream.arrow",
    "file.arrow",
    "file_zstd.arrow",
    "groups.parquet",
    "lines.jsonl",
    "list.json",
    "lines.jsonl.gz",
]


@pytest.mark.parametrize("name", FORMS)
def test_mutated_files_never_crash(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    outcome = fuzz((tmp_path / name).read_bytes(), tmp_path / f"mutated-{name}", cases=60, seed=1)
    assert outcome["cases"] == 60
    assert outcome["read"] + outcome["refused"] == 60
    assert outcome["unexpected"] == []
