"""What docs/results.md says of the experiment is what ``only=report`` makes of the files in the repository."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rest.eval import experiment

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "results" / "smollm2"
PAGE = ROOT / "docs" / "results.md"
MADE = ("results.md", "results.json", "plots")


def tables(text: str) -> list[list[str]]:
    """Markdown tables, each as its lines."""
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def leaves(value: Any) -> Iterator[Any]:
    """Keys and values of nested JSON, in order."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def test_kept_files_are_as_they_were_written() -> None:
    """kept.json has the digest of each file beside it: nothing was mended by hand."""
    folders = sorted(path.parent for path in KEPT.rglob("kept.json"))
    assert len(folders) >= 1 + 6 + 20, "warm start, learning rates, four algorithms x five seeds"
    for folder in folders:
        digests = json.loads((folder / "kept.json").read_text())["files"]
        files = [path for path in folder.iterdir() if path.name not in ("kept.json", ".complete")]  # a stage's stamp
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        assert found == digests, folder


def test_the_report_is_what_the_kept_files_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "smollm2"
    shutil.copytree(KEPT, folder, ignore=shutil.ignore_patterns(*MADE))
    monkeypatch.setattr(experiment, "plot_experiment", lambda *args: [])  # drawn in tests/eval; pixels are matplotlib's
    assert experiment.main([str(folder)]) == 0
    anew = "make experiment MODEL=smollm2 EXPERIMENT_ARGS='only=report'"
    assert (folder / "results.md").read_text() == (KEPT / "results.md").read_text(), anew
    made, kept = (list(leaves(json.loads((path / "results.json").read_text()))) for path in (folder, KEPT))
    assert made == [pytest.approx(leaf, abs=1e-9) if isinstance(leaf, float) else leaf for leaf in kept], anew


def test_tables_of_the_page_are_the_reports() -> None:
    _, _, section = PAGE.read_text(encoding="utf-8").partition("## On a pretrained model of 135 M parameters\n")
    section, _, _ = section.partition("\n## ")
    made = tables((KEPT / "results.md").read_text(encoding="utf-8"))
    headers = {table[0] for table in made}
    shown = [table for table in tables(section) if table[0] in headers]
    assert len(shown) >= 5 and all(table in made for table in shown)
    for picture in re.findall(r"\]\((results/[^)]+\.png)\)", section):
        assert (PAGE.parent / picture).is_file(), picture
