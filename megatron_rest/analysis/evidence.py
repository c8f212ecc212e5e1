"""``RUN_DIR/variance.json`` as text: how much each weighting changed the variance of the run's own policy gradient.

Needs no torch: ``megatron-rest report`` shows it wherever the run's folder is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rest.analysis.summary import table_lines

__all__ = ["EVIDENCE_FILE", "evidence_lines", "read_evidence"]

EVIDENCE_FILE = "variance.json"


def evidence_lines(run_dir: str | Path) -> list[str]:
    """Tables of every measured step; nothing if ``python -m megatron_rest.analysis.variance --run`` was not run."""
    lines: list[str] = []
    for step in read_evidence(run_dir):
        lines += [*([""] if lines else []), *_step_lines(step)]
    return lines


def read_evidence(run_dir: str | Path) -> list[dict[str, Any]]:
    """What was measured, step by step; nothing if it was not measured."""
    path = Path(run_dir) / EVIDENCE_FILE
    return list(json.loads(path.read_text(encoding="utf-8")).get("steps", [])) if path.is_file() else []


def _step_lines(step: Mapping[str, Any]) -> list[str]:
    """Variance ratios, then entropy and score norm by region."""
    rows = [
        [
            row["name"],
            _with_error(row, "variance", "standard_error"),
            _with_error(row, "ratio", "ratio_standard_error"),
            _number(row["signal"]),
        ]
        for row in step["variance"]
    ]
    header = ["weights", "variance", "ratio to uniform", "|mean gradient|^2"]
    regions = [
        [
            name,
            str(values["tokens"]),
            f"{values['entropy']:.3f}",
            f"{values['score_norm']:.3f}",
            _number(beta["score_norm"]),
            *_shares(step, name),
        ]
        for (name, values), beta in zip(
            step["entropy"]["regions"].items(), step["last_layer"]["regions"].values(), strict=True
        )
    ]
    columns = [
        "region",
        "tokens",
        "entropy (nats)",
        "1 - sum p^2",
        "|h|^2 (1 - sum p^2)",
        "of squared gradients",
        "of tokens",
    ]
    return [
        f"variance of the policy gradient, step {step['step']}: {step['num_sequences']} rollouts of "
        f"{step['num_groups']} prompts, all {step['num_parameters']:,} parameters of {step['model']}",
        f"(+- one standard error, prompts as the independent units; mean |log-prob - rollout's| of these weights: "
        f"{step['mean_abs_log_ratio']:.2g} nats)",
        *([f"(estimated from sketches of {step['sketch']:,} numbers a gradient)"] if step.get("sketch") else []),
        *table_lines(header, rows),
        "",
        *table_lines(columns, regions),
        f"correlation of a token's entropy with 1 - sum p^2: {_number(step['entropy']['correlation'])}, "
        f"with |h|^2 (1 - sum p^2): {_number(step['last_layer']['correlation'])}",
    ]


def _shares(step: Mapping[str, Any], region: str) -> list[str]:
    """A region's part of the squared gradients and of the tokens, of rollouts with an advantage."""
    shares = step.get("gradient", {}).get(region)
    return [f"{shares['of_squares']:.1%}", f"{shares['of_tokens']:.1%}"] if shares else ["-", "-"]


def _with_error(row: Mapping[str, Any], value: str, error: str) -> str:
    return f"{_number(row[value])} +- {_number(row[error], digits=2)}"


def _number(value: float | None, *, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
