"""Mutated real files: a clear error or rows that add up, never a crash.  ``fuzzing.py`` runs more cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_tools.fuzzing import fuzz_target, write_targets

TARGETS = [
    "stream.arrow",
    "file.arrow",
    "file_zstd.arrow",
    "groups.parquet",
    "lines.jsonl",
    "list.json",
    "lines.jsonl.gz",
    "save_to_disk",
    "prepared",
]


@pytest.fixture(scope="module")
def targets(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_targets(tmp_path_factory.mktemp("targets"), tokenizer_folder)


@pytest.mark.parametrize("cases", [8, pytest.param(40, marks=pytest.mark.extended)])
@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_never_crash(
    name: str, cases: int, targets: dict[str, Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    outcome = fuzz_target(targets[name], tokenizer_folder, tmp_path / "scratch", cases=cases, seed=1)
    assert outcome["unexpected"] == []
    assert outcome["read"] + outcome["refused"] == outcome["cases"] == cases
    assert outcome["refused"] > 0
