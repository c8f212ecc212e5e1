"""What is known of a benchmark's rows in training data, from the data's own manifest (``megatron-rest-data``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from megatron_rest.data.prompt_files import read_manifest

__all__ = ["Decontamination", "decontamination_lines", "decontamination_of"]


class Decontamination(TypedDict):
    """One prepared folder."""

    training_data: str
    passes: list[dict[str, Any]]  # of `megatron-rest-data decontaminate`: against, ngram, min_overlap, rows_removed
    problem: str  # why nothing is known; empty if the manifest was read


def decontamination_of(folder: str | Path) -> Decontamination:
    """Every decontamination that a prepared folder went through, latest first."""
    try:
        manifest = read_manifest(Path(folder))
    except (ValueError, OSError) as error:
        return {"training_data": str(folder), "passes": [], "problem": str(error)}
    passes = []
    derived, removed = manifest.get("derived_from"), manifest.get("counts", {}).get("rows_quarantined")
    while isinstance(derived, dict):
        operation = derived.get("operation", {})
        if operation.get("command") == "decontaminate":
            passes.append({**{k: v for k, v in operation.items() if k != "command"}, "rows_removed": removed})
        derived = derived.get("before")
        removed = derived.get("rows_removed") if isinstance(derived, dict) else None
    return {"training_data": str(folder), "passes": passes, "problem": ""}


def decontamination_lines(reports: list[Decontamination]) -> list[str]:
    """For people, beside a score."""
    if not reports:
        return ["training data: not known here (--train-data); whether it holds benchmark rows is not checked"]
    lines = []
    for report in reports:
        name = f"training data {report['training_data']}"
        for done in report["passes"]:
            rule = f"that held {done['min_overlap']:.0%} of an item's {done['ngram']}-grams"
            against = ", ".join(done["against"])
            lines.append(f"{name}: decontaminated against {against} ({done['rows_removed']} rows removed {rule})")
        if not report["passes"]:
            lines.append(f"{name}: {report['problem'] or 'NOT decontaminated against any benchmark'}")
    return lines
