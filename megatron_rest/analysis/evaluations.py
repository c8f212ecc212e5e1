"""Benchmark scores in a run's folder, as ``megatron-rest eval`` writes them.

``RUN_DIR/eval/**/summary.json``, and of the validations during training the last: the highest version in
``RUN_DIR/validation/version_*/*/summary.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rest.analysis.series import MetricsFileError
from megatron_rest.analysis.summary import table_lines

__all__ = ["EVAL_DIR", "evaluation_lines"]

EVAL_DIR = "eval"
VALIDATION_DIR = "validation"


def evaluation_lines(run_dir: str | Path) -> list[str]:
    """One table over all scored benchmarks; nothing if there are none.

    Raises MetricsFileError for a summary that cannot be read.
    """
    folder = Path(run_dir)
    versions = sorted((folder / VALIDATION_DIR).glob("version_*[0-9]"))
    rows: list[list[str]] = []
    for path in [p for place in (folder / EVAL_DIR, *versions[-1:]) for p in sorted(place.rglob("summary.json"))]:
        name = str(path.parent.relative_to(folder))
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            parts = [*summary["categories"].items(), ("all", summary["all"])]
            rows += [_row(name, category, part) for category, part in parts]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MetricsFileError(f"{path} is not a summary of megatron-rest eval: {error!r}") from error
    if not rows:
        return []
    header = ["scored", "category", "cases", "accuracy", "95 % interval (cases)", "soft", "most frequent error"]
    return table_lines(header, rows)


def _row(name: str, category: str, part: Mapping[str, Any]) -> list[str]:
    accuracy, soft = part["accuracy"], part["soft_accuracy"]
    wrong = next(((kind, n) for kind, n in part["outcomes"].items() if kind != "correct"), None)
    return [
        name,
        category,
        str(part["cases"]),
        f"{accuracy['estimate']:.1%}",
        f"{accuracy['low']:.1%} to {accuracy['high']:.1%}",
        "-" if soft is None else f"{soft['estimate']:.1%}",
        "-" if wrong is None else f"{wrong[0]} {wrong[1]}",
    ]
